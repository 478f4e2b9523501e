"""The training loop, in plain PyTorch: alone, under torchrun, or as a Ray Train worker.

A run is a function of (settings, shards, step): it may stop anywhere and goes on from its newest checkpoint with the
same data order, on the same number of workers with the same bits. Everything that crosses ranks happens on all ranks
in the same order; rank 0 alone logs and tells the tracker.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.optimizer import clip_grad_norm, warmup_cosine
from model.transformer import Transformer, init_weights
from pipeline import huggingface
from pipeline.batches import BatchLoader, BatchOrder
from pipeline.checkpoint import (
    CheckpointInfo,
    CheckpointWriter,
    list_checkpoints,
    load_training_state,
    read_info,
    training_state,
)
from pipeline.config import PretrainConfig, to_dict
from pipeline.errors import UserError
from pipeline.evaluation import ValidationResult, validation_loss
from pipeline.manifest import as_folder
from pipeline.optimization import build_optimizer, compiles
from pipeline.parallel import (
    Workers,
    compute_dtype,
    local_part,
    parallelize,
    peak_flops,
    repeatable,
    set_gradient_sync,
)
from pipeline.progress import Clock
from pipeline.runs import RunSummary, check_resumable, open_data, run_inputs, write_summary
from pipeline.sampling import continue_text
from pipeline.shards import open_split
from pipeline.storage import Folder
from pipeline.tokenizer_file import TOKENIZER_NAME
from pipeline.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, as this rank saw it; tensors, so that nothing waits for the device."""

    loss: Tensor
    """This rank's share of the step's mean loss, () float32; averaged over ranks it is the loss."""
    grad_norm: Tensor
    """Global norm before clipping, () float32."""
    lr: float
    data_wait_seconds: float


class Trainer:
    """One training run on one rank.

    Args:
        config: resolved settings.
        data: folder (of a disk or in a bucket) with manifest.json, shards and tokenizer.json.
        output: the run's folder, seen by every rank.
        workers: this process among the others.
        tracker: told of everything on rank 0, unused elsewhere.

    Raises:
        UserError: shards of another tokenizer, a checkpoint of another model or data order, too little data.
    """

    def __init__(
        self, config: PretrainConfig, *, data: Path | Folder, output: Path, workers: Workers, tracker: Tracker
    ) -> None:
        self.config, self.output, self.workers, self.tracker = config, output, workers, tracker
        self.data = data = as_folder(data)
        self.tokenizer, self.manifest = open_data(data)
        self.train_stream, self.val_stream = open_split(data, "train"), open_split(data, "val")
        self.order = BatchOrder(
            num_windows=len(self.train_stream) // (config.context_length + 1),
            windows_per_step=config.windows_per_step,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.model_config = config.model_config(self.manifest.vocab_size)
        self.dtype = compute_dtype(config.precision, workers.device)
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config, self.workers)
        self.loader = BatchLoader(
            self.train_stream,
            self.order,
            context_length=config.context_length,
            rank=workers.rank,
            world_size=workers.world_size,
            device=workers.device,
        )
        self.first_loss = self.last_loss = math.nan
        self.validation: ValidationResult | None = None
        self.sample = ""
        self.writer = CheckpointWriter(
            output / "checkpoints",
            workers,
            keep=config.keep_checkpoints,
            tokenizer_json=data.read(TOKENIZER_NAME).decode(),
        )
        self.start_step = self._resume()
        self.clock = Clock(
            self.start_step, config, self.model_config.flops_per_token(), peak_flops(workers, self.dtype)
        )

    def run(self) -> RunSummary:
        """Train to the last step; returns the same summary on every rank."""
        self._announce()
        for step in range(self.start_step, self.config.train_steps):
            result = self.train_step(step)
            self._after_step(step + 1, result)
        self.writer.wait()
        summary = self._summarize()
        if self.workers.is_first:
            write_summary(self.output, summary)
            self.tracker.finish("FINISHED")
        return summary

    def train_step(self, step: int) -> StepResult:
        """Forward and backward over the step's windows, clip, update. ``step`` counts from 0."""
        lr = self._learning_rate(step)
        with repeatable(self.workers.device):
            loss, data_wait_seconds = self._gradients(step)
            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            grad_norm = clip_grad_norm(gradients, self.config.grad_clip, all_reduce=self.workers.sum)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
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
            batch = next(batches)
            data_wait_seconds += time.perf_counter() - start
            set_gradient_sync(self.model, enabled=index == count - 1)
            micro_loss = self.model(batch.inputs, batch.targets) * batch.weight
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss, data_wait_seconds

    def _after_step(self, done: int, result: StepResult) -> None:
        """Everything that is due after ``done`` steps. A checkpoint comes before evaluation, which may fail."""
        config = self.config
        self.clock.add(result.data_wait_seconds)
        last = done == config.train_steps
        saves = done % config.checkpoint_every == 0 or last
        if done == 1 or done % config.log_every == 0 or saves:  # a loss that is not finite is seen before it is saved
            self._log_step(done, result)
        with self.clock.paused():
            if saves:
                self._save(done)
            if done % config.val_every == 0 or last:
                self._validate(done)
            if done % config.sample_every == 0 or last:
                self._sample(done)

    def _build_model(self) -> Transformer:
        model = Transformer(self.model_config)
        init_weights(model, self.config.seed)
        compile_blocks = compiles(self.config, self.workers)
        return parallelize(model, self.workers, dtype=self.dtype, compile_blocks=compile_blocks)

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, or the weights of --checkpoint; returns the first step to do."""
        checkpoints = list_checkpoints(self.output / "checkpoints")
        newest = self.workers.agree(checkpoints[-1][0] if checkpoints else -1)
        if newest < 0:
            if self.config.checkpoint:
                path = Path(self.config.checkpoint)
                huggingface.check_shape(path, self.model_config)
                huggingface.load_weights(path, self.model)
            return 0
        path = self.output / "checkpoints" / f"step-{newest:06d}"
        info = read_info(path)
        check_resumable(path, info, self.config, self.manifest)
        self.optimizer.init_state()
        load_training_state(path, training_state(self.model, self.optimizer))
        self.optimizer.num_steps = info.step
        self.first_loss, self.last_loss = info.first_loss, info.last_loss
        return info.step

    def _announce(self) -> None:
        if not self.workers.is_first:
            return
        self.tracker.log_params({**to_dict(self.config), "parameters": self.model_config.num_parameters})
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
        loss = self.workers.sum(result.loss.clone()).item() / self.workers.world_size
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {done} is {loss}; lower --lr, and go on from the last checkpoint")
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.last_loss = loss
        if not self.workers.is_first:
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

    def _validate(self, done: int) -> None:
        result = validation_loss(
            self.model,
            self.val_stream,
            self.workers,
            context_length=self.config.context_length,
            batch_size=self.config.batch_size,
            max_tokens=self.config.val_tokens,
        )
        self.validation = result
        if self.workers.is_first:
            self.tracker.log_metrics({"val/loss": result.loss, "val/perplexity": result.perplexity}, done)
            logger.info("step %d: val loss %.4f, perplexity %.2f", done, result.loss, result.perplexity)

    def _sample(self, done: int) -> None:
        prompt, length = self.config.sample_prompt, self.config.sample_tokens
        self.sample = continue_text(self.model, self.tokenizer, prompt, max_new_tokens=length, seed=self.config.seed)
        if self.workers.is_first:
            self.tracker.log_sample(done, self.config.sample_prompt, self.sample)
            logger.info("step %d: sample: %r", done, self.sample)

    def _save(self, done: int) -> None:
        if self.workers.is_first:
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
        )
        path = self.writer.save(training_state(self.model, self.optimizer), info)
        if self.workers.is_first:
            self.tracker.log_checkpoint(done, path, {"train_loss": self.last_loss})

    def _summarize(self) -> RunSummary:
        done = max(self.start_step, self.config.train_steps)
        if self.validation is None:  # stopped between the last checkpoint and what follows it
            self._sample(done)
            self._validate(done)
        assert self.validation is not None
        return RunSummary(
            steps=done,
            tokens_seen=done * self.config.tokens_per_step,
            parameters=self.model_config.num_parameters,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            val_loss=self.validation.loss,
            val_tokens=self.validation.tokens,
            sample=self.sample,
            tokens_per_second=self.clock.overall(),
            checkpoint=str(list_checkpoints(self.output / "checkpoints")[-1][1]),
            peak_memory_gib=peak_memory_gib(self.workers),
        )


def peak_memory_gib(workers: Workers) -> float:
    """The most this process held: the GPU allocator's peak, or resident memory."""
    if workers.device.type == "cuda":
        return torch.cuda.max_memory_allocated(workers.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB
