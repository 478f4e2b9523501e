"""Validation loss: the mean of -log p over the tokens of the val stream, in nats, with each token predicted once.

Windows of context_length tokens follow one another from the start of the val set, so that each token but the first is a
target exactly once; the last window has the rest. llm.c and modded-nanogpt count in the same way: window i has tokens
[i * T, (i + 1) * T) as inputs and the tokens one further on as targets, and nothing separates documents. Over the first
10,485,760 targets of fineweb_val_000000.bin, with a context of 1024, it is the val loss that they publish. Perplexity
is exp(loss) over the same tokens. Of a model that was trained with a document mask, the same tokens are predicted from
their own document alone, as they were in training: another number, which does not compare with theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.transformer import Transformer
from pipeline.console import with_progress
from pipeline.dataset.batches import documents_in, read_windows
from pipeline.dataset.shards import TokenStream
from pipeline.dataset.token_counts import count_tokens
from pipeline.dataset.training_data import ValSource
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    loss: float
    """Nats per token."""
    tokens: int
    """Number of predicted tokens."""
    accuracy: float | None = None
    """Share of them that are the likeliest at their place; None where it was not counted."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is no float, above a loss of 709."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity_text(loss: float) -> str:
    """The perplexity for a line of text: 26.61, or 1.2e+45 where the digits before the point say nothing."""
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1e6 else f"{value:.2g}"


@torch.no_grad()
def validation_loss(
    model: Transformer,
    stream: TokenStream,
    workers: ProcessGroup,
    *,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    document_token: int | None = None,
) -> ValidationResult:
    """Mean loss over the first ``max_tokens`` targets of ``stream`` (by default all); the ranks share the work.

    Every rank runs the same number of forward passes, which are collective operations under FSDP. Losses are summed on
    the device in float64, and the host waits for the device once, at the end. A compiled model runs only batches of
    ``batch_size`` windows compiled, because each other size would need a compilation of its own.

    Args:
        document_token: the token that documents begin with, where no token is to see another document.

    Raises:
        UserError: the stream holds fewer than two tokens.
    """
    targets = min(len(stream) - 1, max_tokens or len(stream))
    if targets < 1:
        raise UserError("the val set is empty; tokenize more documents or raise --val_fraction")
    full_windows, rest = divmod(targets, context_length)
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=workers.device)  # summed loss, counted targets
    one = torch.ones((), dtype=torch.float64, device=workers.device)
    batches = _rank_batches(full_windows, batch_size, workers)
    for windows in with_progress(batches, "validation", "batches", shown=workers.is_rank_zero):
        chosen = windows if len(windows) else np.zeros(1, dtype=np.int64)
        tokens = _read(stream, chosen, length=context_length + 1, stride=context_length, device=workers.device)
        loss = _mean_loss(model, tokens, document_token, as_compiled=len(chosen) == batch_size)
        total += len(windows) * context_length * torch.stack([loss, one])
    if rest:  # every rank computes it, rank 0 counts it
        last = np.array([full_windows])
        tokens = _read(stream, last, length=rest + 1, stride=context_length, device=workers.device)
        loss = _mean_loss(model, tokens, document_token, as_compiled=False)
        total += workers.is_rank_zero * rest * torch.stack([loss, one])
    model.train(training)
    summed, counted = workers.sum(total).tolist()
    return ValidationResult(loss=summed / counted, tokens=int(counted))


def _rank_batches(num_windows: int, batch_size: int, workers: ProcessGroup) -> list[np.ndarray]:
    """The windows of this rank in batches; every rank has the same number of batches, of which some may be empty."""
    mine = np.arange(workers.rank, num_windows, workers.world_size)
    most = -(-num_windows // workers.world_size)
    return [mine[start : start + batch_size] for start in range(0, most, batch_size)]


def _read(stream: TokenStream, windows: np.ndarray, *, length: int, stride: int, device: torch.device) -> torch.Tensor:
    """read_windows, copied to a GPU from pinned memory without waiting for it."""
    tokens = read_windows(stream, windows, length=length, stride=stride, device=torch.device("cpu"))
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens


def _mean_loss(
    model: Transformer, tokens: torch.Tensor, document_token: int | None, *, as_compiled: bool
) -> torch.Tensor:
    """Mean loss of tokens (B, T + 1), () float64 on the device."""
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    documents = None if document_token is None else documents_in(inputs, document_token)
    with contextlib.nullcontext() if as_compiled else torch.compiler.set_stance("force_eager"):
        loss: torch.Tensor = model(inputs, targets, documents=documents, all_count=documents is not None)
    return loss.double()


def bits_per_byte(loss: float, stream: TokenStream, num_targets: int, lengths: npt.NDArray[np.int64]) -> float:
    """The loss in bits per byte of the text that the first ``num_targets`` targets of a stream stand for.

    It does not depend on the tokenizer. ``lengths`` are those of token_counts.byte_lengths, (V,).
    """
    num_bytes = int(count_tokens(stream, 1, num_targets + 1)[: len(lengths)] @ lengths)
    return loss * num_targets / math.log(2) / num_bytes if num_bytes else math.nan


def mixed_result(sources: Sequence[ValSource], results: Sequence[ValidationResult]) -> ValidationResult:
    """The weighted mean of the sources' losses, and all their tokens; of one source its own result."""
    if len(results) == 1:
        return results[0]
    loss = sum(source.weight * result.loss for source, result in zip(sources, results, strict=True))
    return ValidationResult(loss=loss, tokens=sum(result.tokens for result in results))


def mixed_bits_per_byte(
    loss: float, sources: Sequence[ValSource], results: Sequence[ValidationResult], lengths: npt.NDArray[np.int64]
) -> float:
    """bits_per_byte of a loss over the sources' tokens, mixed by their weights."""
    if len(sources) == 1:
        return bits_per_byte(loss, sources[0].stream, results[0].tokens, lengths)
    bits_per_nat = [
        bits_per_byte(1.0, source.stream, result.tokens, lengths)
        for source, result in zip(sources, results, strict=True)
    ]
    return loss / sum(source.weight / bits for source, bits in zip(sources, bits_per_nat, strict=True))


def entropy(counts: npt.NDArray[Any]) -> float:
    """Entropy of the frequencies in ``counts``, which need not be whole numbers, in nats.

    For the tokens of a stream it is the loss of the best model that ignores the context. The difference to the loss of
    a trained model shows what it has learned from the context.
    """
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
