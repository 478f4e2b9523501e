"""The training loop, in plain PyTorch: alone, under torchrun, or as a Ray Train worker.

A run is a function of (settings, shards, step): it may stop anywhere and goes on from its newest checkpoint with the
same data order, on the same number of workers with the same bits. Everything that crosses ranks happens on all ranks
in the same order; rank 0 alone logs and tells the tracker.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.optimizer import clip_grad_norm, warmup_cosine
from model.transformer import Transformer, init_weights
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.reader import local_checkpoint, open_newest, read_tensors
from pipeline.checkpoints.writer import CheckpointWriter, training_state
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.dataset.batches import BatchLoader, BatchOrder, MicroBatch
from pipeline.dataset.dataset import TOKENIZER_NAME, open_data
from pipeline.dataset.shards import open_split
from pipeline.distributed import determinism
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, parallelize, set_gradient_sync
from pipeline.distributed.hardware import compute_dtype, peak_flops, peak_memory_gib
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.recomputation import recompute_blocks
from pipeline.distributed.signals import Interruptions
from pipeline.distributed.startup_timer import StartupTimer
from pipeline.errors import RunStopped, UserError
from pipeline.pretrained import weights
from pipeline.storage.folders import Folder, as_folder, in_bucket, open_folder
from pipeline.tracking import hardware
from pipeline.tracking.tracker import Tracker
from pipeline.training.batch_size import out_of_memory_told
from pipeline.training.garbage import GarbageCollection
from pipeline.training.largest_batch import with_batch_size
from pipeline.training.nonfinite import Search
from pipeline.training.optimizer import build_optimizer, compiles
from pipeline.training.outcomes import Outcome
from pipeline.training.periodic_evaluation import RunEvaluation
from pipeline.training.profiling import StepProfiler
from pipeline.training.run_folder import RunSummary, check_resumable, run_inputs, write_summary
from pipeline.training.step_guard import Guard
from pipeline.training.throughput import Clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, the same on every rank; tensors, so that nothing waits for the device."""

    loss: Tensor
    """Mean over the step's windows, () float32."""
    grad_norm: Tensor
    """Global norm before clipping, () float32."""
    lr: float
    data_wait_seconds: float
    """On this rank."""
    is_left_out: bool = False
    """Loss or gradient was not finite, and nothing was changed."""


class Trainer:
    """One training run on one rank.

    Args:
        config: resolved settings.
        data: folder (of a disk or in a bucket) with manifest.json, shards and tokenizer.json.
        output: the run's folder (on a disk or in a bucket), seen by every rank.
        workers: this process among the others.
        tracker: told of everything on rank 0, unused elsewhere.
        startup: what it took to come here; goes on counting until the first step is done.
        interruptions: what may end the run early.

    Raises:
        UserError: shards of another tokenizer, a checkpoint of another model or data order, too little data.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        data: Path | Folder,
        output: Path | Folder,
        workers: ProcessGroup,
        tracker: Tracker,
        startup: StartupTimer | None = None,
        interruptions: Interruptions | None = None,
    ) -> None:
        self.startup = startup or StartupTimer()
        self.config, self.workers, self.tracker = config, workers, tracker
        self.is_deterministic = config.deterministic == "on"
        self.data, self.output = data, output = as_folder(data), as_folder(output)
        self.tokenizer, self.manifest = open_data(data)
        self.train_stream, self.val_stream = open_split(data, "train"), open_split(data, "val")
        self.startup.mark("data")
        self.model_config = config.model_config(self.manifest.vocab_size)
        self.dtype = compute_dtype(config.precision, workers.device)
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config, self.workers)
        self.optimizer.init_state()
        self.config = config = with_batch_size(config, self.model, output=output, workers=workers)
        self.order = BatchOrder(
            num_windows=len(self.train_stream) // (config.context_length + 1),
            windows_per_step=config.windows_per_step,
            batch_size=config.micro_batch,
            seed=config.seed,
        )
        self.startup.mark("model")
        self.loader = BatchLoader(
            self.train_stream,
            self.order,
            context_length=config.context_length,
            rank=workers.rank,
            world_size=workers.world_size,
            device=workers.device,
        )
        streams = (self.train_stream, self.val_stream)
        self.guard = Guard(config, workers, streams, interruptions or Interruptions())
        self.profiler = StepProfiler(config, output=output, workers=workers, tracker=tracker)
        self.first_loss = self.last_loss = math.nan
        self.skipped_steps = 0
        self.evaluation = RunEvaluation(
            config, self.model, self.tokenizer, self.val_stream, output=output, workers=workers, tracker=tracker
        )
        self.writer = CheckpointWriter(
            open_folder(f"{output}/checkpoints"),
            workers,
            tokenizer_json=data.read(TOKENIZER_NAME).decode(),
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            also_keep=lambda: {self.evaluation.best.step} if self.evaluation.best else set(),
        )
        self.start_step = self._resume()
        self.writer.reserve(training_state(self.model, self.optimizer))
        self.startup.mark("checkpoint")
        self.clock = Clock(
            self.start_step, config, self.model_config.flops_per_token(), peak_flops(workers, self.dtype)
        )

    def run(self) -> RunSummary:
        """Train to the last step; returns the same summary on every rank.

        Raises:
            RunStopped: it was asked to end earlier, and has saved what is done.
            UserError: on every rank, where any of them cannot go on.
        """
        self._announce()
        with (
            self.guard,
            self.profiler,
            out_of_memory_told(self.config, self.workers.world_size),
            GarbageCollection() as garbage,
        ):
            with self.clock.paused(), self.guard.watchdog.phase("compiling the evaluation"):
                self.evaluation.compile()
            if self.start_step:  # who saved this step may have died before it was measured
                with self.clock.paused(), self.guard.watchdog.phase("in the evaluation of the step resumed from"):
                    self.evaluation.run(self.start_step, self.writer.place(self.start_step))
            step = self.start_step
            while step < self.config.train_steps:
                step = self.advance(step)
                if self._is_due(step):
                    with self.clock.paused():
                        garbage.collect()
            with self.guard.watchdog.phase("at the last checkpoint"):
                self.writer.wait()
        summary = self._summarize()
        if self.workers.is_rank_zero:
            write_summary(self.output, summary)
            self.tracker.finish("FINISHED")
        return summary

    def advance(self, step: int) -> int:
        """Do ``step`` (from 0) and what is due behind it; returns the step to do next.

        That is an earlier one where a step is found not to be finite only while the next one runs: since then nothing
        has changed (outcomes.py).
        """
        is_first = step == self.start_step  # compiles
        with self.profiler.step(step + 1), self.guard.watchdog.step(step + 1, is_long=is_first):
            result = self.train_step(step)
            outcomes = self.guard.read(everything=is_first or self._is_due(step + 1))
        if is_first:
            self._report_startup(step + 1)
        for outcome in outcomes:
            if not outcome.is_finite:
                self._leave_out(outcome)
                if outcome.step < step:
                    return outcome.step + 1
                result = replace(result, is_left_out=True)
        self._after_step(step + 1, result)
        return step + 1

    def train_step(self, step: int) -> StepResult:
        """Forward and backward over the step's windows, clip, update. ``step`` counts from 0.

        Nothing is updated where loss or gradient is not finite on any rank, or where a rank cannot go on.
        """
        lr = self._learning_rate(step)
        with deterministic(self.workers.device, enabled=self.is_deterministic):
            share, data_wait_seconds = self._gradients(step)
            flags = self.guard.flags(self.writer.error())
            sums: list[Tensor] = []

            def sum_over_ranks(norm_squared: Tensor) -> Tensor:
                sums.extend(self.guard.outcomes.add(step, norm_squared, share, flags))
                return sums[0]

            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            grad_norm = clip_grad_norm(gradients, self.config.grad_clip, all_reduce=sum_over_ranks)
            _, loss, allowed = sums
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step(allowed=allowed)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, data_wait_seconds=data_wait_seconds)

    def _gradients(self, step: int) -> tuple[Tensor, float]:
        """Adds up the step's gradients; returns its loss on this rank, and the seconds spent waiting for batches."""
        loss = torch.zeros((), device=self.workers.device)
        data_wait_seconds = 0.0
        batches = self.loader.step(step)
        count = self.order.num_micro_batches(self.workers.world_size)
        for index in range(count):
            start = time.perf_counter()
            batch = self._next_batch(batches)
            data_wait_seconds += time.perf_counter() - start
            set_gradient_sync(self.model, enabled=index == count - 1)
            micro_loss = self.model(batch.inputs, batch.targets) * batch.weight
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss, data_wait_seconds

    def _next_batch(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        """The next micro-batch; one of zeros without weight where this rank has trouble with its shards.

        It goes through the step with the others, and all of them learn of it at the end.
        """
        if self.guard.trouble is None:
            try:
                return next(batches)
            except UserError as error:
                self.guard.trouble = error
        shape = (min(self.config.micro_batch, self.config.windows_per_step), self.config.context_length)
        zeros = torch.zeros(shape, dtype=torch.int64, device=self.workers.device)
        return MicroBatch(inputs=zeros, targets=zeros, weight=0.0)

    def _leave_out(self, outcome: Outcome) -> None:
        """Go on without a step that is not finite, or end the run; either way say what caused it. Collective.

        Raises:
            UserError: there were more such steps than --skip_nonfinite allows.
        """
        length, allowed = self.config.context_length, self.config.skip_nonfinite
        search = Search(
            self.model,
            self.workers,
            self.train_stream,
            self.order,
            context_length=length,
            deterministic=self.is_deterministic,
        )
        with self.guard.watchdog.phase(f"looking for what is not finite in step {outcome.step + 1}"):
            sentence = search.explain(outcome, self.tokenizer)
        self.skipped_steps += 1
        if self.skipped_steps > allowed:
            raise UserError(
                f"{sentence}; --skip_nonfinite allows {allowed} such steps: raise it, lower --lr or mend the data; "
                "the same command goes on from the newest checkpoint, which was saved before"
            )
        self.guard.outcomes.go_on()
        self.optimizer.num_steps = outcome.step + 1 - self.skipped_steps  # as if the step had not been
        if self.workers.is_rank_zero:
            logger.warning("%s; the step is left out, %d of %d", sentence, self.skipped_steps, allowed)
            self.tracker.log_metrics({"train/skipped_steps": self.skipped_steps}, outcome.step + 1)

    def _is_due(self, done: int) -> bool:
        """Whether anything but the next step follows ``done`` steps."""
        config = self.config
        evaluations = (config.val_every, config.sample_every, config.hellaswag_every)
        intervals = (config.log_every, config.checkpoint_every, *evaluations)
        return done in {1, config.train_steps} or any(done % interval == 0 for interval in intervals)

    def _after_step(self, done: int, result: StepResult) -> None:
        """Everything that is due after ``done`` steps. A checkpoint comes before evaluation, which may fail."""
        config = self.config
        self.clock.add(result.data_wait_seconds)
        saves = done % config.checkpoint_every == 0 or done == config.train_steps or self.guard.wants_checkpoint
        if done == 1 or done % config.log_every == 0 or saves:
            self._log_step(done, result)
        with self.clock.paused(), self.guard.watchdog.phase(f"behind step {done}"):
            path = self._save(done) if saves else None
            self.guard.wants_checkpoint = False
            if self.guard.is_stopping:
                self._end_early(done)
            self.evaluation.run(done, path)

    def _build_model(self) -> Transformer:
        model = Transformer(self.model_config)
        init_weights(model, self.config.seed)
        if self.config.recompute == "blocks":
            recompute_blocks(model)
        compile_blocks = compiles(self.config, self.workers)
        return parallelize(model, self.workers, dtype=self.dtype, compile_blocks=compile_blocks)

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, or the weights of --checkpoint; returns the first step to do."""
        with open_newest(self.writer.folder, self.workers) as found:
            if found is not None:
                check_resumable(found.name, found.info, self.config, self.manifest)
                read_tensors(found.path, training_state(self.model, self.optimizer))
        if found is None:
            if given := self.config.checkpoint:
                path = local_checkpoint(given) if in_bucket(given) else Path(given)
                weights.check_shape(path, self.model_config)
                weights.load_weights(path, self.model)
            return 0
        info = found.info
        self.skipped_steps = info.skipped_steps
        self.optimizer.num_steps = info.step - info.skipped_steps
        self.first_loss, self.last_loss = info.first_loss, info.last_loss
        return info.step

    def _announce(self) -> None:
        if not self.workers.is_rank_zero:
            return
        if self.is_deterministic and self.workers.device.type == "cuda":
            for sentence in determinism.nondeterministic_settings():
                logger.warning(sentence)
        self.tracker.log_params({**to_dict(self.config), "parameters": self.model_config.num_parameters})
        self.tracker.log_tags(hardware.hardware_tags(self.workers))
        self.tracker.log_inputs(run_inputs(self.data, self.manifest))
        logger.info(
            "%s parameters, %s train tokens, %d workers on %s, %s; %s",
            f"{self.model_config.num_parameters:,}",
            f"{len(self.train_stream):,}",
            self.workers.world_size,
            self.workers.device.type,
            str(self.dtype).removeprefix("torch."),
            f"resuming at step {self.start_step}" if self.start_step else "starting at step 0",
        )

    def _report_startup(self, done: int) -> None:
        if self.workers.device.type == "cuda":
            torch.cuda.synchronize()
        self.startup.mark("first step")
        if self.workers.is_rank_zero:
            logger.info(self.startup.line())
            self.tracker.log_metrics(self.startup.metrics(), done)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return warmup_cosine(
            step,
            max_lr=config.lr,
            min_lr=config.lr * config.min_lr_fraction,
            warmup_steps=round(config.train_steps * config.warmup_fraction),
            total_steps=config.train_steps,
        )

    def _log_step(self, done: int, result: StepResult) -> None:
        if result.is_left_out:
            return
        loss = result.loss.item()
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.last_loss = loss
        if not self.workers.is_rank_zero:
            return
        speed = self.clock.read()
        self.tracker.log_metrics(
            {
                "train/loss": loss,
                "train/grad_norm": result.grad_norm.item(),
                "train/lr": result.lr,
                "tokens_seen": done * self.config.tokens_per_step,
                **speed,
            },
            done,
        )
        logger.info(self.clock.line(done, loss, result, speed))

    def _save(self, done: int) -> Folder:
        if self.workers.is_rank_zero:
            self.tracker.flush()  # every point up to a checkpoint is durable, so a resumed run leaves no gap
        info = CheckpointInfo(
            step=done,
            tokens_seen=done * self.config.tokens_per_step,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            model=self.model_config.to_dict(),
            config=to_dict(self.config),
            data=str(self.data),
            manifest_fingerprint=self.manifest.fingerprint,
            tokenizer_fingerprint=self.manifest.tokenizer_fingerprint,
            world_size=self.workers.world_size,
            skipped_steps=self.skipped_steps,
        )
        path = self.writer.save(training_state(self.model, self.optimizer), info)
        if self.workers.is_rank_zero:
            self.tracker.log_checkpoint(done, path, {"train_loss": self.last_loss})
            self.tracker.log_metrics({"perf/checkpoint_stall_seconds": self.writer.stall_seconds}, done)
        return path

    def _end_early(self, done: int) -> None:
        self.writer.wait()
        if self.workers.is_rank_zero:
            self.tracker.finish("KILLED")
        raise RunStopped(f"stopped at step {done} of {self.config.train_steps}; the same command goes on from there")

    def _summarize(self) -> RunSummary:
        done = max(self.start_step, self.config.train_steps)
        measured = self.evaluation
        assert measured.validation is not None
        return RunSummary(
            steps=done,
            tokens_seen=done * self.config.tokens_per_step,
            parameters=self.model_config.num_parameters,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            val_loss=measured.validation.loss,
            val_tokens=measured.validation.tokens,
            sample=measured.sample,
            tokens_per_second=self.clock.overall(),
            checkpoint=str(self.writer.place(done)),
            peak_memory_gib=peak_memory_gib(self.workers),
            **measured.summary(),
        )
