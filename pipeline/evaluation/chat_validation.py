"""Validation on packed conversations: loss and accuracy over the tokens that the model is to say.

Conversations do not see each other, as in training, so the figures do not depend on how they are packed (but for the
last bits of the sums). Accuracy is the share of those tokens that are the likeliest ones at their place.
"""

from __future__ import annotations

import numpy as np
import torch

from model.transformer import Transformer
from pipeline.console import with_progress
from pipeline.dataset.batches import window_batch
from pipeline.dataset.shards import PackedStream
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.evaluation.validation import ValidationResult

_MOST_LOGITS = 1 << 26  # of one forward pass, all of which are in memory at once, in float32


@torch.no_grad()
def chat_validation(
    model: Transformer,
    stream: PackedStream,
    workers: ProcessGroup,
    *,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> ValidationResult:
    """Mean loss and accuracy over the learned tokens of the first windows of ``stream``; the ranks share the work.

    Every rank runs the same number of forward passes, which are collective operations under FSDP.

    Args:
        max_tokens: of inputs, filling included; at least one window is read. Not given: all.

    Raises:
        UserError: the stream holds no window, or nothing in it is learned.
    """
    length = context_length + 1
    num_windows = len(stream) // length
    if max_tokens is not None:
        num_windows = min(num_windows, max(1, max_tokens // context_length))
    if num_windows < 1:
        raise UserError("no conversation is held out for validation; give more of them, or raise --val_fraction")
    size = max(1, min(batch_size, _MOST_LOGITS // (context_length * model.config.padded_vocab_size)))
    mine = np.arange(workers.rank, num_windows, workers.world_size)
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=workers.device)  # summed loss, right ones, all
    with torch.compiler.set_stance("force_eager"):  # logits are computed in no other place
        starts = range(0, -(-num_windows // workers.world_size), size)
        for start in with_progress(starts, "validation", "batches", shown=workers.is_rank_zero):
            windows = mine[start : start + size]
            chosen = windows if len(windows) else np.zeros(1, dtype=np.int64)  # to join the others' collectives
            total += min(1, len(windows)) * _sums(model, stream, chosen, length, workers.device)
    model.train(training)
    summed, right, counted = workers.sum(total).tolist()
    if not counted:
        raise UserError("the conversations held out for validation have no answer to learn; give other ones")
    return ValidationResult(loss=summed / counted, tokens=int(counted), accuracy=right / counted)


def _sums(
    model: Transformer, stream: PackedStream, windows: np.ndarray, length: int, device: torch.device
) -> torch.Tensor:
    """Summed loss, number of right tokens and number of all learned tokens of the windows, (3,) float64."""
    batch = window_batch(stream, windows, length=length, weight=1.0, device=device)
    logits = model(batch.inputs, documents=batch.documents)  # (B, T, V)
    counts = batch.targets >= 0
    chosen, targets = logits[counts].float(), batch.targets[counts]  # (N, V), (N,)
    losses = chosen.logsumexp(dim=-1) - chosen.gather(1, targets[:, None])[:, 0]
    right = chosen.argmax(dim=-1) == targets
    return torch.stack([losses.double().sum(), right.sum().double(), counts.sum().double()])
