"""Why the loss or gradient of a step is not finite: the step is computed again, by micro-batch and then by window.

No update has happened since (step_guard.py), so data and weights that caused it will do so again. If it does not happen
again, the hardware was at fault.

Shapes: B windows of a micro-batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from model.transformer import Transformer
from pipeline.dataset.batches import BatchLoader, MicroBatch, window_batch
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, set_gradient_sync
from pipeline.distributed.process_group import ProcessGroup
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.training.step_guard import Outcome

_MOST_WINDOWS = 3  # named in the message
_TEXT_TOKENS = 24
_TEXT_CHARACTERS = 60


class NonFiniteFinder:
    """Finds the windows of the run's ``loader`` that caused a step that is not finite, and shows their text.

    ``deterministic_mode`` is that of the steps on a GPU, which are computed again in the same mode.
    """

    def __init__(
        self,
        model: Transformer,
        workers: ProcessGroup,
        loader: BatchLoader,
        tokenizer: Tokenizer,
        *,
        deterministic_mode: bool,
    ) -> None:
        self.model, self.workers, self.loader, self.tokenizer = model, workers, loader, tokenizer
        self.stream, self.order, self.context_length = loader.stream, loader.order, loader.context_length
        self.document_token = loader.document_token
        self.deterministic_mode = deterministic_mode

    def explain(self, outcome: Outcome) -> str:
        """What happened at a step and what caused it, as the beginning of a sentence. Collective."""
        what = f"the loss of step {outcome.step + 1} is {outcome.loss} and its gradient norm {outcome.grad_norm}"
        causes = self._causes(outcome.step)
        if not causes:
            return f"{what}; computed again they are finite, so suspect a device or its memory"
        return f"{what}, because of {'; '.join(causes)}"

    def _causes(self, step: int) -> list[str]:
        """The causes, the same on every rank; empty if all losses and gradients are finite this time. Collective."""
        causes: list[str] = []
        for index, batch in enumerate(self.loader.step(step)):
            loss_is_bad, gradient_is_bad = self._probe(batch)
            if any(loss_is_bad) or gradient_is_bad:
                causes += self._narrow(step, index, loss_is_bad)
        return causes

    def _narrow(self, step: int, index: int, loss_is_bad: list[bool]) -> Iterator[str]:
        """The causes in micro-batch ``index``: all ranks together try the windows of each candidate rank one by one."""
        candidate_ranks = [rank for rank, is_bad in enumerate(loss_is_bad) if is_bad]
        found = False
        for rank in candidate_ranks or range(self.workers.world_size):
            windows = self.order.micro_batch_windows(step, rank, self.workers.world_size)[index].tolist()
            with torch.compiler.set_stance("force_eager"):  # one window is another shape, compiled for minutes
                nonfinite_windows = [window for window in windows if self._is_bad(window)]
            if nonfinite_windows or candidate_ranks:
                what = "loss" if candidate_ranks else "gradient"
                yield self._cause_text(what, rank, nonfinite_windows or windows)
                found = True
        if not found:  # no window alone is a cause
            windows = self.order.micro_batch_windows(step, 0, self.workers.world_size)[index].tolist()
            yield self._cause_text("gradient", 0, windows)

    def _is_bad(self, window: int) -> bool:
        length, device = self.context_length + 1, self.workers.device
        batch = window_batch(
            self.stream,
            np.array([window]),
            length=length,
            weight=1.0,
            device=device,
            document_token=self.document_token,
        )
        loss_is_bad, gradient_is_bad = self._probe(batch)
        return any(loss_is_bad) or gradient_is_bad

    def _probe(self, batch: MicroBatch) -> tuple[list[bool], bool]:
        """Forward and backward. Collective.

        Returns:
            For each rank whether its loss is not finite, and whether the gradient of any rank is not finite.
        """
        set_gradient_sync(self.model, enabled=True)
        with deterministic(self.workers.device, enabled=self.deterministic_mode):
            loss = self.model(batch.inputs, batch.targets, documents=batch.documents, all_count=batch.all_count)
            loss = loss * batch.weight
            loss.backward()
        gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32))
        table = torch.zeros(self.workers.world_size, 2, device=self.workers.device)
        table[self.workers.rank] = torch.stack([~torch.isfinite(loss.detach()), ~torch.isfinite(norms).all()]).float()
        rows = self.workers.sum(table).tolist()
        self.model.zero_grad(set_to_none=True)
        return [loss_flag > 0 for loss_flag, _ in rows], any(gradient_flag > 0 for _, gradient_flag in rows)

    def _cause_text(self, what: str, rank: int, windows: Sequence[int]) -> str:
        """``what``, "loss" or "gradient", of ``rank`` is not finite on these windows."""
        places = ", ".join(self._window_text(window) for window in windows[:_MOST_WINDOWS])
        more = f" and {len(windows) - _MOST_WINDOWS} more" if len(windows) > _MOST_WINDOWS else ""
        return f"the {what} of rank {rank} on window {places}{more}"

    def _window_text(self, window: int) -> str:
        position = window * (self.context_length + 1)
        name, offset = self.stream.shard_at(position)
        ids = self.stream.read(position, min(_TEXT_TOKENS, self.context_length)).tolist()
        return f"{window} ({name}, token {offset:,}: {self.tokenizer.decode(ids)[:_TEXT_CHARACTERS]!r})"
