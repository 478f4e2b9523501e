"""The output projection and the cross-entropy in one: the logits of a whole micro-batch are never there at once.

For 32 windows of 1,024 tokens over 50,304 columns they would take 6.6 GB in float32, 3.3 GB in bfloat16. Here a chunk
of rows is projected, turned into losses and into its share of both gradients, and forgotten; backward multiplies what
is ready by the incoming gradient. The matrix products are the same three as without chunks.

On CUDA a kernel of ours (loss_kernel.py) makes the losses of a chunk and writes the gradient over its logits, in one
launch; where triton is not installed, and on a CPU, plain operations do, equal up to rounding.

Shapes: N = B T rows, C rows of a chunk, D model, V vocab, P padded vocab.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}
"""Memory of one chunk's logits in the type of the products, at most, per device type.

Every chunk reads and writes the weight's gradient once more (155 MB of float32 for the recipe). On a GPU 1 GiB, about
10,000 rows of bfloat16, keeps that to a few per cent of the chunk's products; a CPU's chunk should stay in its cache.
"""

KERNEL_DEVICES = ("cuda",) if importlib.util.find_spec("triton") else ()
"""Types of devices where the kernel is used."""

_ROW_MULTIPLE = 128  # rows of a tensor-core tile


class LinearCrossEntropy(nn.Module):
    """See linear_cross_entropy; a module, so that it can be compiled. x (B, T, D), weight (P, D), targets (B, T)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, x: Tensor, weight: Tensor, targets: Tensor, *, ignores: bool = False) -> Tensor:
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), self.vocab_size, ignores=ignores)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, ignores: bool = False
) -> Tensor:
    """Mean of -log softmax(x weight^T)[target] in nats over the first vocab_size columns, 0-d float32.

    Products are computed in x's type; what comes between them, the sums of losses and the sum of the weight's gradient
    over chunks are float32. Where gradients are switched off none is computed.

    Args:
        x: (N, D).
        weight: (P, D), of any float type; rows from vocab_size on are padding: left out of the sum, gradient zero.
        targets: (N,) int64, each in [0, vocab_size).
        vocab_size: V, at most P.
        ignores: whether targets below 0 stand for rows that do not count. Their loss and gradient are zero; the sum is
            divided by N all the same, which the caller knows how to make good for.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, vocab_size, torch.is_grad_enabled(), ignores)


class _LinearCrossEntropy(torch.autograd.Function):
    """With z = x W^T and G = (softmax(z) - one_hot(target)) / N: dloss/dx = G W, dloss/dW = G^T x."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes arguments by position
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, with_gradients: bool, ignores: bool
    ) -> Tensor:
        cast_weight = weight.to(x.dtype)
        total, grad_weight, grads_x = x.new_zeros((), dtype=torch.float32), None, []
        for rows in _row_chunks(x.shape[0], cast_weight):
            chunk = x[rows]  # (C, D)
            logits = chunk @ cast_weight.T  # (C, P)
            computed = _counted_loss_and_gradient if ignores else _loss_and_gradient
            losses, grad = computed(logits, targets[rows], vocab_size, x.shape[0], with_gradients)
            total = total + losses.sum()
            if grad is None:
                continue
            grads_x.append(grad @ cast_weight)  # (C, D)
            grad_weight = _add_product(grad_weight, grad.T, chunk)  # (P, D)
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grads_x), grad_weight.to(weight.dtype))
        return total / x.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return grad_x * grad_loss, grad_weight * grad_loss, None, None, None, None
        # In place: a pass of its own over 155 MB less. A second backward then finds them changed, and raises.
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk's C rows, and G (C, P) in the logits' type, which may take the place of the logits."""
    if logits.device.type in KERNEL_DEVICES:
        losses = write_gradient_(logits, targets, vocab_size, num_rows, with_gradients)
        return losses, logits if with_gradients else None
    if torch.compiler.is_compiling():
        return _fused_loss_and_gradient(logits, targets, vocab_size, num_rows, with_gradients)
    real = logits[:, :vocab_size]
    target_logits = real.gather(1, targets[:, None]).float()  # (C, 1)
    wide = real.float()  # the same memory where the products are float32
    largest = wide.amax(dim=1, keepdim=True)
    sums = wide.sub_(largest).exp_().sum(dim=1, keepdim=True)
    losses = sums.log() + largest - target_logits  # (C, 1)
    if not with_gradients:
        return losses, None
    wide.mul_((sums * num_rows).reciprocal_())
    rows = torch.arange(len(targets), device=targets.device)
    wide.index_put_((rows, targets), wide.new_full((), -1 / num_rows), accumulate=True)  # repeatable on CUDA too
    if wide.dtype != real.dtype:
        real.copy_(wide)
    logits[:, vocab_size:] = 0
    return losses, logits


def _counted_loss_and_gradient(
    logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The same, with zeros in the rows whose target is below 0."""
    counts = targets >= 0
    losses, grad = _loss_and_gradient(logits, targets.clamp(min=0), vocab_size, num_rows, with_gradients)
    losses = losses.flatten() * counts
    if grad is None:
        return losses, None
    is_fused = torch.compiler.is_compiling()
    return losses, grad * counts[:, None] if is_fused else grad.mul_(counts[:, None])


@torch.library.custom_op("gpt25::write_gradient_", mutates_args=("logits",))
def write_gradient_(logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool) -> Tensor:
    """Losses (C,) float32 of a chunk; with_gradients puts G in the place of the logits (C, P), else they stay.

    Triton is imported here and not before: it is there on machines with a GPU only. A loss is NaN where the target is
    outside [0, vocab_size).
    """
    from model import loss_kernel

    return loss_kernel.write_gradient(logits, targets, vocab_size, num_rows, with_gradients)


@write_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool) -> Tensor:
    return logits.new_empty(targets.shape, dtype=torch.float32)


def _fused_loss_and_gradient(
    logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The same without writing into anything: a compiler makes one reduction and one element-wise pass of it.

    The logits of the targets are a sum over all columns, because a gather would be put off to the end of all chunks,
    whose logits would then be kept. A target outside [0, vocab_size) makes the loss NaN.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_target = columns == targets[:, None]  # (C, P)
    wide = logits.float().masked_fill(columns >= vocab_size, -math.inf)
    largest = wide.amax(dim=1, keepdim=True)
    weights = (wide - largest).exp()
    sums = weights.sum(dim=1, keepdim=True)
    target_logits = torch.where(is_target, logits, 0).sum(dim=1, keepdim=True, dtype=torch.float32)
    target_logits = torch.where(_exist(targets, vocab_size)[:, None], target_logits, math.nan)
    losses = sums.log() + largest - target_logits  # (C, 1)
    if not with_gradients:
        return losses, None
    return losses, (weights * (1 / (sums * num_rows)) - is_target.float() * (1 / num_rows)).to(logits.dtype)


def _exist(targets: Tensor, vocab_size: int) -> Tensor:
    return (targets >= 0) & (targets < vocab_size)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in float32, in place of total; the product alone at first."""
    if total is None:
        return (left @ right).float()
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _row_chunks(num_rows: int, weight: Tensor) -> Iterator[slice]:
    """Slices of rows, of about equal size, whose logits take CHUNK_BYTES at most (but one row at least)."""
    row_bytes = weight.shape[0] * weight.element_size()
    num_chunks = math.ceil(num_rows * row_bytes / CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"]))
    size = max(1, math.ceil(num_rows / max(1, num_chunks)))
    if size > _ROW_MULTIPLE:
        size = size // _ROW_MULTIPLE * _ROW_MULTIPLE
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))
