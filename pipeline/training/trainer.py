"""The training loop, in plain PyTorch: in one process, under torchrun, or as a Ray Train worker.

A run is a function of (settings, shards, step): it may stop anywhere and resumes from its newest checkpoint with the
same data order, on the same number of workers with the same bits. All ranks call collective operations in the same
order; only rank 0 logs and calls the tracker.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch

from model.optimizer import clip_by_norm, local_squared_norm
from model.transformer import Transformer, init_weights
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.reader import local_checkpoint, open_newest, read_tensors
from pipeline.checkpoints.writer import CheckpointWriter, training_state
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.dataset.batches import BatchLoader
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.dataset.manifest import BASE_TOKENIZER
from pipeline.dataset.training_data import Folders
from pipeline.distributed import determinism
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, parallelize
from pipeline.distributed.hardware import compute_dtype, memory_gib, peak_flops, peak_memory_gib
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.recomputation import recompute_blocks
from pipeline.distributed.signals import Interruptions
from pipeline.distributed.startup_timer import StartupTimer
from pipeline.errors import RunStopped, UserError
from pipeline.pretrained import weights
from pipeline.run_files import CHECKPOINTS_FOLDER, SUMMARY_FILE
from pipeline.storage.folders import Folder, as_folder, in_bucket, open_folder
from pipeline.storage.json_files import write_json
from pipeline.tokenizer.bpe import END_OF_TEXT
from pipeline.tracking import hardware
from pipeline.tracking.tracker import Tracker
from pipeline.training.batch_size import building_explained, out_of_memory_explained
from pipeline.training.garbage import GarbageCollection
from pipeline.training.largest_batch import with_batch_size
from pipeline.training.nonfinite import NonFiniteFinder
from pipeline.training.optimizer import build_optimizer, compiles, learning_rate
from pipeline.training.periodic_evaluation import PeriodicEvaluation
from pipeline.training.profiling import StepProfiler
from pipeline.training.run_folder import (
    RunSummary,
    check_resumable,
    mixture_info,
    open_data_of_run,
    run_inputs,
    step_settings,
)
from pipeline.training.step import StepAbandoned, StepResult, accumulate_gradients
from pipeline.training.step_guard import Outcome, StepGuard
from pipeline.training.throughput import ThroughputMeter

logger = logging.getLogger(__name__)


class Trainer:
    """One training run on one rank.

    Args:
        config: resolved settings.
        data: folder (on a disk or in a bucket) with manifest.json, shards and tokenizer.json; of a mixture, all of
            them, in the order of config.mixture.
        output: the run folder (on a disk or in a bucket), which every rank can read and write.
        workers: the process group of the run.
        tracker: receives all metrics and events on rank 0; unused elsewhere.
        startup: timer of this start; it runs until the first step is done.
        interruptions: what may end the run early.

    Raises:
        UserError: shards of another tokenizer, a checkpoint of another model or data order, too little data.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        data: Folders,
        output: Path | Folder,
        workers: ProcessGroup,
        tracker: Tracker,
        startup: StartupTimer | None = None,
        interruptions: Interruptions | None = None,
    ) -> None:
        self.startup = startup or StartupTimer()
        self.config, self.workers, self.tracker = config, workers, tracker
        self.is_deterministic = config.deterministic == "on"
        self.output = output = as_folder(output)
        self.data = open_data_of_run(config, data)
        self.tokenizer, self.manifest = self.data.tokenizer, self.data.manifest
        self.train_stream, train_streams = self.data.open_train(
            window_length=config.context_length + 1, packing=config.packing
        )
        self.val_sources = self.data.open_val()
        self.startup.mark("data")
        self.model_config = config.model_config(self.manifest.vocab_size)
        self.dtype = compute_dtype(config.precision, workers.device)
        with building_explained(self.model_config, workers.world_size):
            self.model = self._build_model()
            self.optimizer = build_optimizer(self.model, config, self.workers)
            self.optimizer.init_state()
        self.config = config = with_batch_size(config, self.model, output=output, workers=workers)
        self.startup.mark("model")
        self.loader = self._build_loader()
        streams = [*train_streams, *(source.stream for source in self.val_sources)]
        self.guard = StepGuard(config, workers, streams, interruptions or Interruptions())
        self.profiler = StepProfiler(config, output=output, workers=workers, tracker=tracker)
        self.first_loss = self.last_loss = math.nan
        self.skipped_steps = 0
        self.saved_step: int | None = None
        """The steps of the newest checkpoint that this process has saved."""
        self.evaluation = PeriodicEvaluation(
            config, self.model, self.tokenizer, self.val_sources, output=output, workers=workers, tracker=tracker,
            chat_template=self.manifest.chat_template,
        )  # fmt: skip
        self.writer = CheckpointWriter(
            open_folder(f"{output}/{CHECKPOINTS_FOLDER}"),
            workers,
            tokenizer_json=self.data.sources[0].folder.read(TOKENIZER_NAME).decode(),
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            also_keep=lambda: {self.evaluation.best.step} if self.evaluation.best else set(),
        )
        self.start_step = self._resume()
        self.writer.reserve(training_state(self.model, self.optimizer))
        self.startup.mark("checkpoint")
        self.throughput = ThroughputMeter(
            self.start_step, config, self.model_config.flops_per_token(), peak_flops(workers, self.dtype)
        )

    def run(self) -> RunSummary:
        """Train to the last step; returns the same summary on every rank.

        Raises:
            RunStopped: the run was asked to end earlier, and has saved a checkpoint.
            UserError: any rank cannot continue; every rank raises it.
        """
        self._announce()
        self.evaluation.mend_best(self.writer.folder)
        with (
            self.guard,
            self.profiler,
            out_of_memory_explained(self.config, self.workers.world_size),
            GarbageCollection() as garbage,
        ):
            with self.throughput.paused(), self.guard.watchdog.phase("compiling the evaluation"):
                self.evaluation.compile()
            if self.start_step:  # the run that saved this step may have died before evaluating it
                with self.throughput.paused(), self.guard.watchdog.phase("in the evaluation of the step resumed from"):
                    self.evaluation.run(self.start_step, self.writer.path_of_step(self.start_step))
            step = self.start_step
            while step < self.config.train_steps:
                step = self.advance(step)
                if self._is_due(step):
                    with self.throughput.paused():
                        garbage.collect()
            with self.guard.watchdog.phase("at the last checkpoint"):
                self.writer.wait()
        summary = self._summarize()
        if self.workers.is_rank_zero:
            write_json(self.output, SUMMARY_FILE, asdict(summary), indent=2)
            self.tracker.finish("FINISHED")
        return summary

    def advance(self, step: int) -> int:
        """Do ``step`` (counted from 0) and all that is due after it; returns the step to do next.

        On a GPU a step may prove not to be finite only while the next one runs. Then the step after the bad one is
        returned again; no update has happened since (step_guard.py).
        """
        is_first = step == self.start_step  # compiles
        with self.profiler.step(step + 1), self.guard.watchdog.step(step + 1, is_long=is_first):
            try:
                result = self.train_step(step)
            except StepAbandoned:
                self._end_between_steps(step)
            outcomes = self.guard.take_outcomes(everything=is_first or self._is_due(step + 1))
        if is_first:
            self._report_startup(step + 1)
        for outcome in outcomes:
            if not outcome.is_finite:
                self._skip(outcome)
                if outcome.step < step:
                    return outcome.step + 1
                result = replace(result, is_rejected=True)
        self._after_step(step + 1, result)
        return step + 1

    def train_step(self, step: int) -> StepResult:
        """Forward and backward over the windows of ``step`` (counted from 0), clip, update. Collective.

        Nothing is updated if loss or gradient is not finite on any rank, or if a rank cannot continue.
        """
        lr = learning_rate(self.config, step)
        with deterministic(self.workers.device, enabled=self.is_deterministic):
            loss_share, data_wait_seconds = accumulate_gradients(
                self.model, self.loader, step, self.guard, self.throughput.add_micro_batch
            )
            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            flags = self.guard.flags(self.writer.error())
            reduced = self.guard.outcomes.all_reduce(step, local_squared_norm(gradients), loss_share, flags)
            grad_norm = reduced.squared_norm.sqrt()
            clip_by_norm(gradients, grad_norm, self.config.grad_clip or math.inf)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            self.optimizer.step(allowed=reduced.allowed)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=reduced.loss, grad_norm=grad_norm, lr=lr, data_wait_seconds=data_wait_seconds)

    def _skip(self, outcome: Outcome) -> None:
        """Continue without a step that is not finite, and say what caused it; UserError above --skip_nonfinite steps.

        Collective.
        """
        allowed = self.config.skip_nonfinite
        with self.guard.watchdog.phase(f"looking for what is not finite in step {outcome.step + 1}"):
            finder = NonFiniteFinder(
                self.model, self.workers, self.loader, self.tokenizer, deterministic_mode=self.is_deterministic
            )
            sentence = finder.explain(outcome)
        self.skipped_steps += 1
        if self.skipped_steps > allowed:
            raise UserError(
                f"{sentence}; --skip_nonfinite allows {allowed} such steps: raise it, lower --lr or mend the data; "
                "the same command goes on from the newest checkpoint, which was saved before"
            )
        self.guard.outcomes.resume_updates()
        self.optimizer.num_steps = outcome.step + 1 - self.skipped_steps  # a rejected step is not an update
        if self.workers.is_rank_zero:
            logger.warning("%s; the step is left out, %d of %d", sentence, self.skipped_steps, allowed)
            self.tracker.log_metrics({"train/skipped_steps": self.skipped_steps}, outcome.step + 1)

    def _is_due(self, done: int) -> bool:
        """Whether logging, a checkpoint or an evaluation is due after ``done`` steps."""
        config = self.config
        evaluations = (config.val_every, config.sample_every, config.hellaswag_every)
        tasks_every = config.tasks_every if config.tasks else None
        intervals = (config.log_every, config.checkpoint_every, *evaluations, tasks_every)
        return done in {1, config.train_steps} or any(done % interval == 0 for interval in filter(None, intervals))

    def _after_step(self, done: int, result: StepResult) -> None:
        """Do all that is due after ``done`` steps. A checkpoint comes before the evaluation, which may fail."""
        config = self.config
        self.throughput.add(result.data_wait_seconds)
        saves = done % config.checkpoint_every == 0 or done == config.train_steps or self.guard.wants_checkpoint
        if done == 1 or done % config.log_every == 0 or saves:
            self._log_step(done, result)
        elif not result.is_rejected and self.workers.device.type == "cpu":
            line = self.throughput.short_line(done, result.loss.item())
            if line and self.workers.is_rank_zero:
                logger.info(line)
        with self.throughput.paused(), self.guard.watchdog.phase(f"after step {done}"):
            path = self._save(done) if saves else None
            self.guard.wants_checkpoint = False
            if self.guard.is_stopping:
                self._end_early(done)
            self.evaluation.run(done, path)

    def _build_model(self) -> Transformer:
        model = Transformer(self.model_config)
        init_weights(model, self.config.seed, self.config.init)
        if self.config.recompute == "blocks":
            recompute_blocks(model)
        compile_blocks = compiles(self.config, self.workers)
        return parallelize(model, self.workers, dtype=self.dtype, compile_blocks=compile_blocks)

    def _build_loader(self) -> BatchLoader:
        length, workers = self.config.context_length, self.workers
        order = self.data.order(
            self.train_stream,
            window_length=length + 1,
            windows_per_step=self.config.windows_per_step,
            batch_size=self.config.micro_batch,
            seed=self.config.seed,
        )
        return BatchLoader(
            self.train_stream,
            order,
            context_length=length,
            rank=workers.rank,
            world_size=workers.world_size,
            device=workers.device,
            document_token=self.tokenizer.eot_id if self.config.document_mask else None,
        )

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, or the weights of --checkpoint; returns the first step to do."""
        with open_newest(self.writer.folder, self.workers) as found:
            if found is not None:
                check_resumable(found.name, found.info, self.config, self.data)
                read_tensors(found.path, training_state(self.model, self.optimizer))
        if found is None:
            if given := self.config.checkpoint:
                path = local_checkpoint(given) if in_bucket(given) else Path(given)
                changed = weights.check_fits(
                    *(path, self.model_config, self.manifest.tokenizer_fingerprint),
                    base_fingerprint=self.manifest.settings.get(BASE_TOKENIZER),
                )
                if changed and self.workers.is_rank_zero:
                    logger.info("from the weights of %s, with %s", path, changed)
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
        settings = step_settings(self.config, self.data, self.start_step)
        self.tracker.log_start(self.start_step, settings, lambda step: learning_rate(self.config, step))
        self.tracker.log_params({**to_dict(self.config), "parameters": self.model_config.num_parameters})
        self.tracker.log_tags(hardware.hardware_tags(self.workers))
        self.tracker.log_inputs(run_inputs(self.data))
        logger.info(
            "%s parameters, %s train tokens, %d worker%s on %s, %s; %s",
            f"{self.model_config.num_parameters:,}",
            f"{len(self.train_stream):,}",
            self.workers.world_size,
            "s" if self.workers.world_size > 1 else "",
            self.workers.device.type,
            str(self.dtype).removeprefix("torch."),
            f"resuming at step {self.start_step}" if self.start_step else "starting at step 0",
        )
        for note in self.train_stream.notes():
            logger.info("%s", note)

    def _report_startup(self, done: int) -> None:
        if self.workers.device.type == "cuda":
            torch.cuda.synchronize()
        self.startup.mark("first step")
        if self.workers.is_rank_zero:
            logger.info(self.startup.line())
            self.tracker.log_metrics(self.startup.metrics(), done)

    def _log_step(self, done: int, result: StepResult) -> None:
        if result.is_rejected:
            return
        loss = result.loss.item()
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.last_loss = loss
        if not self.workers.is_rank_zero:
            return
        speed = self.throughput.take_metrics()
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
        logger.info(self.throughput.line(done, loss, result, speed, memory_gib(self.workers)))

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
            data=self.data.address,
            manifest_fingerprint=self.data.fingerprint,
            tokenizer_fingerprint=self.manifest.tokenizer_fingerprint,
            world_size=self.workers.world_size,
            skipped_steps=self.skipped_steps,
            eot_id=None if self.tokenizer.end_of_text == END_OF_TEXT else self.tokenizer.eot_id,
            **mixture_info(self.data),
            chat_template=self.manifest.chat_template,
        )
        path = self.writer.save(training_state(self.model, self.optimizer), info)
        self.saved_step = done
        if self.workers.is_rank_zero:
            self.tracker.log_checkpoint(done, path, {"train_loss": self.last_loss})
            self.tracker.log_metrics({"perf/checkpoint_stall_seconds": self.writer.stall_seconds}, done)
        return path

    def _end_early(self, done: int) -> NoReturn:
        self.writer.wait()
        if self.workers.is_rank_zero:
            self.tracker.finish("KILLED")
        raise RunStopped(f"stopped at step {done} of {self.config.train_steps}; the same command goes on from there")

    def _end_between_steps(self, done: int) -> NoReturn:
        """End the run in the middle of the step behind ``done`` steps, of which nothing stays."""
        self.optimizer.zero_grad(set_to_none=True)
        if done not in {self.start_step, self.saved_step}:
            self._save(done)
        self._end_early(done)

    def _summarize(self) -> RunSummary:
        done = max(self.start_step, self.config.train_steps)
        measured = self.evaluation
        return RunSummary(
            steps=done,
            tokens_seen=done * self.config.tokens_per_step,
            parameters=self.model_config.num_parameters,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            val_loss=measured.validation.loss if measured.validation else None,
            val_tokens=measured.validation.tokens if measured.validation else 0,
            sample=measured.sample,
            tokens_per_second=self.throughput.tokens_per_second(),
            checkpoint=str(self.writer.path_of_step(done)),
            peak_memory_gib=peak_memory_gib(self.workers),
            **measured.summary(),
        )
