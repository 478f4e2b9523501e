"""Why a step's loss or gradient is not finite: the step computed again, micro-batch by micro-batch, window by window.

Nothing has changed since (outcomes.py), so what the data and the weights caused is caused again. What does not come
back was the machine's doing.

Shapes: B windows of a micro-batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.transformer import Transformer
from pipeline.dataset.batches import BatchOrder, micro_batches, read_windows
from pipeline.dataset.shards import TokenStream
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, set_gradient_sync
from pipeline.distributed.process_group import ProcessGroup
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.training.outcomes import Outcome

_MOST_WINDOWS = 3  # told of
_TEXT_TOKENS = 24
_TEXT_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Windows of one rank whose loss or gradient is not finite."""

    rank: int
    windows: tuple[int, ...]
    what: str
    """loss or gradient."""


class Search:
    """Finds the causes of a step that is not finite.

    Args:
        stream, order: where the windows come from.
        context_length: T.
        deterministic: whether the run's steps repeat their bits on a GPU; the search computes as they do.
    """

    def __init__(
        self,
        model: Transformer,
        workers: ProcessGroup,
        stream: TokenStream,
        order: BatchOrder,
        *,
        context_length: int,
        deterministic: bool = True,
    ) -> None:
        self.model, self.workers, self.stream, self.order = model, workers, stream, order
        self.context_length, self.deterministic = context_length, deterministic

    def causes(self, step: int) -> list[Cause]:
        """The same on every rank; empty where every loss and gradient is finite this time. Collective."""
        batches = micro_batches(
            self.stream,
            self.order,
            context_length=self.context_length,
            step=step,
            rank=self.workers.rank,
            world_size=self.workers.world_size,
            device=self.workers.device,
        )
        found: list[Cause] = []
        for index, batch in enumerate(batches):
            loss_is_bad, gradient_is_bad = self._probe(batch.inputs, batch.targets, batch.weight)
            if any(loss_is_bad) or gradient_is_bad:
                found += self._narrow(step, index, loss_is_bad)
        return found

    def _narrow(self, step: int, index: int, loss_is_bad: list[bool]) -> Iterator[Cause]:
        """Of micro-batch ``index``: all ranks together try one window of a suspect after another."""
        suspects = [rank for rank, is_bad in enumerate(loss_is_bad) if is_bad]
        named = False
        for rank in suspects or range(self.workers.world_size):
            windows = self.order.micro_batch_windows(step, rank, self.workers.world_size)[index]
            with torch.compiler.set_stance("force_eager"):  # one window is another shape, compiled for minutes
                guilty = [window for window in windows if self._is_bad(window)]
            if guilty or suspects:
                chosen = tuple(int(window) for window in (guilty or windows))
                yield Cause(rank=rank, windows=chosen, what="loss" if suspects else "gradient")
                named = True
        if not named:  # only together
            windows = self.order.micro_batch_windows(step, 0, self.workers.world_size)[index]
            yield Cause(rank=0, windows=tuple(int(window) for window in windows), what="gradient")

    def _is_bad(self, window: int) -> bool:
        length = self.context_length + 1
        device = self.workers.device
        tokens = read_windows(self.stream, np.array([window]), length=length, stride=length, device=device)
        loss_is_bad, gradient_is_bad = self._probe(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1.0)
        return any(loss_is_bad) or gradient_is_bad

    def _probe(self, inputs: torch.Tensor, targets: torch.Tensor, weight: float) -> tuple[list[bool], bool]:
        """Forward and backward: whose loss is not finite, by rank, and whether the gradient of all is. Collective."""
        set_gradient_sync(self.model, enabled=True)
        with deterministic(self.workers.device, enabled=self.deterministic):
            loss = self.model(inputs, targets) * weight
            loss.backward()
        gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32))
        table = torch.zeros(self.workers.world_size, 2, device=self.workers.device)
        table[self.workers.rank] = torch.stack([~torch.isfinite(loss.detach()), ~torch.isfinite(norms).all()]).float()
        rows = self.workers.sum(table).tolist()
        self.model.zero_grad(set_to_none=True)
        return [loss_flag > 0 for loss_flag, _ in rows], any(gradient_flag > 0 for _, gradient_flag in rows)

    def explain(self, outcome: Outcome, tokenizer: Tokenizer) -> str:
        """What happened at a step and what caused it, the beginning of a sentence. Collective."""
        what = f"the loss of step {outcome.step + 1} is {outcome.loss} and its gradient norm {outcome.grad_norm}"
        causes = self.causes(outcome.step)
        if not causes:
            return f"{what}; computed again they are finite, so suspect a device or its memory"
        return f"{what}, because of " + "; ".join(self._describe(cause, tokenizer) for cause in causes)

    def _describe(self, cause: Cause, tokenizer: Tokenizer) -> str:
        places = ", ".join(self._place(window, tokenizer) for window in cause.windows[:_MOST_WINDOWS])
        more = f" and {len(cause.windows) - _MOST_WINDOWS} more" if len(cause.windows) > _MOST_WINDOWS else ""
        return f"the {cause.what} of rank {cause.rank} on window {places}{more}"

    def _place(self, window: int, tokenizer: Tokenizer) -> str:
        position = window * (self.context_length + 1)
        shard, offset = self.stream.locate(position)
        name = self.stream.files.name(shard) if self.stream.files is not None else f"shard {shard}"
        ids = self.stream.read(position, min(_TEXT_TOKENS, self.context_length)).tolist()
        return f"{window} ({name}, token {offset:,}: {tokenizer.decode(ids)[:_TEXT_CHARACTERS]!r})"
