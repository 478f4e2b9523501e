"""Rows of ids whose last ones are scored, and how likely a model finds these: what every task comes down to.

Shapes: N rows, B rows of a batch, T time, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.console import with_progress
from pipeline.distributed.process_group import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows of token ids, for any number of scorings."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    """The ids of all rows, concatenated."""
    offsets: npt.NDArray[np.int64]
    """(N + 1,) Offset of each row in ``ids``, and the total length."""
    scored: npt.NDArray[np.int64]
    """(N,) Number of ids at the end of each row that are scored."""

    def row(self, number: int) -> tuple[list[int], int]:
        """The ids of a row, and how many at its end are scored."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]].tolist(), int(self.scored[number])

    def __len__(self) -> int:
        return len(self.scored)


def join_rows(rows: Iterable[tuple[Sequence[int], int]], dtype: np.dtype[Any]) -> EncodedRows:
    """Rows in one, from the ids of each and how many of them are scored."""
    parts, scored = [], []
    for ids, count in rows:
        parts.append(np.array(ids, dtype=dtype))
        scored.append(count)
    return EncodedRows(
        ids=np.concatenate([np.zeros(0, dtype=dtype), *parts]),
        offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        scored=np.array(scored, dtype=np.int64),
    )


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """What a model makes of rows; float64 and bool on the CPU."""

    log_probabilities: Tensor
    """(N,) Sum of log p over the scored ids, in nats."""
    are_likeliest: Tensor
    """(N,) Whether every scored id is the likeliest at its place."""


@torch.no_grad()
def score_rows(model: Transformer, rows: EncodedRows, workers: ProcessGroup, *, tokens_per_batch: int) -> RowScores:
    """Score rows, which the ranks share; the same result on every rank. Collective.

    Every rank runs the same number of forward passes, each of about ``tokens_per_batch`` tokens with padding. A row
    longer than the model's context is cut at its beginning.
    """
    lengths = np.diff(rows.offsets).tolist()
    found = torch.zeros(len(lengths), 2, dtype=torch.float64)
    training = model.training
    model.eval()
    batches = _batches(lengths, tokens_per_batch)
    numbers = range(-(-len(batches) // workers.world_size))
    for number in with_progress(numbers, "scoring", "batches", shown=workers.is_rank_zero):
        index = number * workers.world_size + workers.rank
        chosen = batches[index] if index < len(batches) else batches[0][:1]  # a forward pass whose result is not used
        values = _score_batch(model, [rows.row(row) for row in chosen], workers.device)
        if index < len(batches):
            found[chosen] = values.double().cpu()
    model.train(training)
    found = workers.sum(found.to(workers.device)).cpu()
    return RowScores(log_probabilities=found[:, 0], are_likeliest=found[:, 1] > 0.5)


def _score_batch(model: Transformer, rows: Sequence[tuple[list[int], int]], device: torch.device) -> Tensor:
    """Sum of log p over the scored ids of each row, in nats, and 1 where all are the likeliest, (B, 2) float32."""
    length = model.config.context_length
    cut = [(ids[-(length + 1) :], min(count, length)) for ids, count in rows]
    longest = max(len(ids) for ids, _ in cut) - 1
    tokens = torch.zeros(len(cut), longest, dtype=torch.int64)
    for row, (ids, _) in enumerate(cut):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # padding on the right, which no token attends to
    logits = model(tokens.to(device))  # (B, T, V)
    found = []
    for row, (ids, count) in enumerate(cut):
        targets = torch.tensor(ids[-count:], device=device)
        own = logits[row, len(ids) - 1 - count : len(ids) - 1].float()  # (count, V)
        total = (own.gather(1, targets[:, None])[:, 0] - own.logsumexp(dim=1)).sum()
        found.append(torch.stack([total, (own.argmax(dim=1) == targets).all().float()]))
    return torch.stack(found)


def _batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers in batches of similar length; the longest come first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches, start = [], 0
    while start < len(order):
        count = max(1, tokens_per_batch // lengths[order[start]])
        batches.append(order[start : start + count])
        start += count
    return batches
