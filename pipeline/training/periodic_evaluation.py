"""Evaluations during training, when they are due: val loss on part of the val set, HellaSwag, tasks, a text sample.

They run on all ranks and do not influence training: with or without them the steps have the same bits. Rank 0 logs to
the tracker, and keeps in <run>/best.json which checkpoint has the lowest val loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from model.transformer import Transformer
from pipeline.config.training import PretrainConfig
from pipeline.conversations.templates import chat_of
from pipeline.dataset.shards import PackedStream
from pipeline.dataset.token_counts import byte_lengths
from pipeline.dataset.training_data import ValSource
from pipeline.distributed.process_group import ProcessGroup
from pipeline.evaluation.chat_validation import chat_validation
from pipeline.evaluation.hellaswag import HellaSwagResult, encode_all, read_questions, score
from pipeline.evaluation.validation import (
    ValidationResult,
    mixed_bits_per_byte,
    mixed_result,
    perplexity_text,
    validation_loss,
)
from pipeline.generation.sampling import continue_ids, continue_text
from pipeline.run_files import TASKS_FILE
from pipeline.storage.folders import Folder, open_folder
from pipeline.tasks.catalog import core_result
from pipeline.tasks.questions import stored_tasks
from pipeline.tasks.results import all_figures
from pipeline.tasks.scoring import score_tasks
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking.tracker import Tracker
from pipeline.training.optimizer import compiles
from pipeline.training.run_folder import Best, best_left, read_best, write_best

logger = logging.getLogger(__name__)

_MOST_TOKENS = 8192  # of a forward pass for tasks, whose logits are all in memory at once


class PeriodicEvaluation:
    """The evaluations of one run, whose folder is ``output``."""

    def __init__(
        self,
        config: PretrainConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        val_sources: Sequence[ValSource],
        *,
        output: Folder,
        workers: ProcessGroup,
        tracker: Tracker,
        chat_template: str | None = None,
    ) -> None:
        self.config, self.model, self.tokenizer, self.val_sources = config, model, tokenizer, val_sources
        self.output, self.workers, self.tracker = output, workers, tracker
        self.validation: ValidationResult | None = None
        """The last validation."""
        self.hellaswag: HellaSwagResult | None = None
        """The last HellaSwag result."""
        self.task_figures: dict[str, float] = {}
        """The last scores on the tasks, by the names of their metrics."""
        self.sample = ""
        """The last text sample."""
        self.best = read_best(self.output)
        self._bits_of_a_nat: float | None = None
        """Bits per byte of text that one nat per token makes; None until it is asked for."""
        self.chat = chat_of(chat_template, tokenizer) if chat_template else None
        """How a sample is asked for; None where it is plain text."""
        self._questions = encode_all(read_questions(config.hellaswag), tokenizer) if config.hellaswag else None
        self._tasks = stored_tasks(output, TASKS_FILE) if config.tasks else ()

    def mend_best(self, checkpoints: Folder) -> None:
        """Replace a best checkpoint that is gone by the best of those in ``checkpoints``; logs on rank 0."""
        before, self.best = self.best, best_left(self.output)
        if self.best == before or not self.workers.is_rank_zero:
            return
        write_best(self.output, self.best)
        if self.best is not None:
            path = open_folder(f"{checkpoints}/step-{self.best.step:06d}")
            self.tracker.log_checkpoint(self.best.step, path, {"val_loss": self.best.val_loss}, best=True)

    def compile(self) -> None:
        """Compile the forward pass of validation now, so that no step waits for it later. Collective.

        Each rank evaluates one batch for it; nothing happens if steps are not compiled.
        """
        if self.config.val_every and self.chat is None and compiles(self.config, self.workers):
            config = self.config
            one_batch = self.workers.world_size * config.micro_batch * config.context_length
            self._validation_losses(self.val_sources[:1], min(one_batch, config.val_tokens))

    def run(self, done: int, checkpoint: Folder | None) -> None:
        """Do the evaluations that are due after ``done`` steps. Collective.

        ``checkpoint`` is that of this step, if one was saved; it may not be complete yet.
        """
        config = self.config
        last = done == config.train_steps
        if config.val_every and (done % config.val_every == 0 or last):
            self._validate(done, checkpoint)
        with torch.compiler.set_stance("force_eager"):  # every other length would be compiled anew
            if self._questions is not None and (done % config.hellaswag_every == 0 or last):
                self._score_hellaswag(done)
            if self._tasks and (done % config.tasks_every == 0 or last):
                self._score_tasks(done)
            if done % config.sample_every == 0 or last:
                self._sample(done)

    def summary(self) -> dict[str, Any]:
        """The fields of RunSummary about the best checkpoint, accuracy and HellaSwag."""
        best = {"best_step": self.best.step, "best_val_loss": self.best.val_loss} if self.best else {}
        accuracy = {"val_accuracy": self.validation.accuracy} if self.validation else {}
        tasks = {"task_scores": self.task_figures} if self.task_figures else {}
        return best | accuracy | tasks | (self.hellaswag.figures() if self.hellaswag else {})

    def _validate(self, done: int, checkpoint: Folder | None) -> None:
        results = self._validation_losses(self.val_sources, self.config.val_tokens)
        self.validation = result = mixed_result(self.val_sources, results)
        is_best = self.best is None or result.loss < self.best.val_loss or done == self.best.step
        if checkpoint is not None and is_best:
            self.best = Best(step=done, val_loss=result.loss)
        if not self.workers.is_rank_zero:
            return
        metrics = {"val/loss": result.loss, "val/perplexity": result.perplexity}
        accuracy = ""
        if result.accuracy is None:
            metrics |= {"val/bits_per_byte": result.loss * self._bits_per_nat(results)}
        else:
            metrics |= {"val/token_accuracy": result.accuracy}
            accuracy = f", {result.accuracy:.1%} of the answers' tokens right"
        losses = {source.name: each.loss for source, each in zip(self.val_sources, results, strict=True)}
        if len(losses) > 1:
            metrics |= {f"val/loss_{name}": loss for name, loss in losses.items()}
        self.tracker.log_metrics(metrics, done)
        logger.info(
            "step %d: val loss %.4f, perplexity %s%s", done, result.loss, perplexity_text(result.loss), accuracy
        )
        if len(losses) > 1:
            logger.info(
                "step %d: val loss of %s", done, ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            )
        if checkpoint is not None:
            if self.best is not None and is_best:
                write_best(self.output, self.best)
            self.tracker.log_checkpoint(done, checkpoint, {"val_loss": result.loss}, best=is_best)

    def _bits_per_nat(self, results: Sequence[ValidationResult]) -> float:
        if self._bits_of_a_nat is None:  # the same tokens every time
            self._bits_of_a_nat = mixed_bits_per_byte(1.0, self.val_sources, results, byte_lengths(self.tokenizer))
        return self._bits_of_a_nat

    def _validation_losses(self, sources: Sequence[ValSource], max_tokens: int) -> list[ValidationResult]:
        """The loss of each source; they share ``max_tokens`` evenly."""
        limits: dict[str, Any] = {
            "context_length": self.config.context_length,
            "batch_size": self.config.micro_batch,
            "max_tokens": max(1, max_tokens // len(sources)),
        }
        document_token = self.tokenizer.eot_id if self.config.document_mask else None
        return [
            chat_validation(self.model, source.stream, self.workers, **limits)
            if isinstance(source.stream, PackedStream)
            else validation_loss(self.model, source.stream, self.workers, **limits, document_token=document_token)
            for source in sources
        ]

    def _score_hellaswag(self, done: int) -> None:
        assert self._questions is not None
        found = score(self.model, self._questions, self.workers, tokens_per_batch=self._tokens_per_batch)
        self.hellaswag = found
        if self.workers.is_rank_zero:
            self.tracker.log_metrics({"eval/hellaswag_acc_norm": found.acc_norm, "eval/hellaswag_acc": found.acc}, done)
            logger.info(
                "step %d: HellaSwag %.4f acc_norm, %.4f acc on %s questions",
                done,
                found.acc_norm,
                found.acc,
                f"{found.questions:,}",
            )

    @property
    def _tokens_per_batch(self) -> int:
        return min(_MOST_TOKENS, self.config.micro_batch * self.config.context_length)

    def _score_tasks(self, done: int) -> None:
        tokens = self._tokens_per_batch
        found = score_tasks(self.model, self.tokenizer, self._tasks, self.workers, tokens_per_batch=tokens)
        core = {name: value for name, value in core_result(self.config.tasks or "", found).items() if value is not None}
        self.task_figures = core | all_figures(found)
        if self.workers.is_rank_zero:
            ends = ("_acc", "_acc_norm", "_centered", "_bits_per_byte")
            shown = {name: value for name, value in self.task_figures.items() if name.endswith(ends) or name == "core"}
            self.tracker.log_metrics({f"eval/{name}": value for name, value in shown.items()}, done)
            if core:
                logger.info("step %d: CORE %.4f on %s tasks", done, core["core"], len(found))

    def _sample(self, done: int) -> None:
        prompt, length = self.config.sample_prompt, self.config.sample_tokens
        settings: dict[str, Any] = {"max_new_tokens": length, "seed": self.config.seed}
        if self.chat is None:
            self.sample = continue_text(self.model, self.tokenizer, prompt, **settings)
        else:
            ids = self.chat.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
            answer = continue_ids(self.model, ids, stop_id=self.chat.end_id, **settings)
            self.sample = f"{prompt}\n\n{self.tokenizer.decode(answer).strip()}"
        if self.workers.is_rank_zero:
            self.tracker.log_sample(done, prompt, self.sample)
            logger.info("step %d: sample: %r", done, self.sample)
