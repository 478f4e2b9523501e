"""Losses and their gradient from a chunk of logits, by one Triton kernel that writes the gradient over the logits.

The only file of the network that imports triton, and itself imported only where a tensor lies on a GPU (loss.py, whose
plain operations it equals up to rounding). A program has a row: it reads it for the largest logit and the sum of
exponentials, and once more, largely from the L2 cache, to write the gradient; plain operations pass over the logits
twice as often. The order of every sum is fixed: same logits, same bits.

Shapes: C rows, V vocab, P columns, of which those from V on are padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 1024
"""Vectors that a program reads at a time."""

VECTOR_BYTES = 16
"""The widest load of one thread: eight logits of bfloat16."""

NUM_WARPS = 16


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]  # noqa: PLR0917  # triton reads annotations its own way
    logits, targets, losses, row_stride, scale,
    VOCAB_SIZE: tl.constexpr, NUM_COLUMNS: tl.constexpr, WITH_GRADIENTS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803  # constants of a compiled kernel, as triton's own are
):  # fmt: skip
    """One row: its loss, and scale (softmax - one_hot(target)) over its logits, 0 over the padding."""
    BLOCK: tl.constexpr = LANES * WIDTH  # noqa: N806
    FULL: tl.constexpr = VOCAB_SIZE // BLOCK * BLOCK  # noqa: N806  # columns in blocks that need no mask
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * row_stride
    places = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < VOCAB_SIZE)
    target_logit = tl.load(first + target, mask=exists, other=float("nan")).to(tl.float32)

    # Every lane keeps a largest logit and a sum of its own; they meet once, behind the loop.
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, FULL, BLOCK):
        values = tl.load(first + start + places, eviction_policy="evict_last")
        largest, total = _add_exponentials(largest, total, values.to(tl.float32))
    for start in tl.range(FULL, VOCAB_SIZE, BLOCK):
        columns = start + places  # masked by NUM_COLUMNS, which keeps the loads wide
        values = tl.load(first + columns, mask=columns < NUM_COLUMNS, other=0.0, eviction_policy="evict_last")
        values = tl.where(columns < VOCAB_SIZE, values.to(tl.float32), float("-inf"))
        largest, total = _add_exponentials(largest, total, values)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
    tl.store(losses + row, tl.log(row_total) + row_largest - target_logit)

    if WITH_GRADIENTS:
        factor = scale / row_total
        for start in tl.range(0, FULL, BLOCK):
            values = tl.load(first + start + places, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(values - row_largest) * factor
            tl.store(first + start + places, gradient.to(logits.dtype.element_ty))
        for start in tl.range(FULL, NUM_COLUMNS, BLOCK):
            columns = start + places
            inside = columns < NUM_COLUMNS
            values = tl.load(first + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.where(columns < VOCAB_SIZE, tl.exp(values - row_largest) * factor, 0.0)
            tl.store(first + columns, gradient.to(logits.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the target's place has been written by another thread before it is written once more
        gradient = tl.exp(target_logit - row_largest) * factor - scale
        tl.store(first + target, gradient.to(logits.dtype.element_ty), mask=exists)


@triton.jit
def _add_exponentials(largest, total, values):  # type: ignore[no-untyped-def]
    """Lane by lane (L,), the largest number and the sum of exp(number - largest), with values (L, WIDTH) added."""
    larger = tl.maximum(largest, tl.max(values, axis=1))
    shift = tl.where(larger == float("-inf"), 0.0, larger)  # a lane that has seen no number: not inf - inf
    total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift[:, None]), axis=1)
    return larger, total


def write_gradient(logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool) -> Tensor:
    """Losses (C,) float32, -log softmax(row)[target] over the first vocab_size columns; NaN where there is no such id.

    Args:
        logits: (C, P), rows one behind the other; with_gradients they become (softmax - one_hot(target)) / num_rows,
            rounded once, the padding 0; else they stay as they are.
        targets: (C,) int64.
        num_rows: rows over which the mean of the losses is taken, those of other chunks too.
    """
    num_logits, num_columns = logits.shape
    losses = torch.empty(num_logits, dtype=torch.float32, device=logits.device)
    _write_gradient[num_logits,](
        logits, targets, losses, logits.stride(0), 1 / num_rows,
        VOCAB_SIZE=vocab_size, NUM_COLUMNS=num_columns, WITH_GRADIENTS=with_gradients,
        LANES=LANES, WIDTH=VECTOR_BYTES // logits.element_size(), num_warps=NUM_WARPS,
    )  # fmt: skip
    return losses
