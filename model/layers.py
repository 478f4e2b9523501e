"""The parts of the network, each written out: linear maps, embedding, norm, rotary positions, attention, loss.

From torch.nn come Module and Parameter only, from torch.nn.functional only scaled_dot_product_attention (flash
attention), and flex attention for documents. Every layer uses its weight inside its own forward and keeps no buffer, so
that sharding, moving, casting and building on the meta device need no special care. Layouts follow transformers' Llama:
the export is a renaming.

Shapes: B batch, T time, S time seen so far (cache included), D model, H heads, K head dim, F feed-forward, V vocab,
P padded vocab, N = B T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.config import ModelConfig

LOSS_CHUNK_ELEMENTS = 2**22
"""Logits turned into float32 at a time by an uncompiled cross_entropy: 16 MiB a temporary, whatever the batch."""


FUSED_ROWS = 256
"""Rows from which on layers with the same input are computed as one product."""

Mask: TypeAlias = Tensor | BlockMask
"""What each position sees: (B, 1, T, T) bool, or the blocks of flex attention (document_attention.py)."""


class Linear(nn.Module):
    """x (..., in) -> x W^T (..., out) in x's type, no bias. The weight (out, in) is zero until something fills it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of x, by one product over their weights side by side.

    The weights stay parameters of their own (checkpoints, export and Muon go by them); putting them side by side copies
    them, which pays from some hundred rows on. Fewer rows, as in generation, take one product a layer.
    """
    if x.shape[:-1].numel() < FUSED_ROWS:
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    return (x @ weight.T).split([layer.weight.shape[0] for layer in layers], dim=-1)


class Embedding(nn.Module):
    """Ids (...) int64 -> their rows (..., D) of the weight (P, D), which is zero until something fills it."""

    def __init__(self, num_rows: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, d_model))

    def forward(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(ids, self.weight)


class _Lookup(torch.autograd.Function):
    """weight[ids], whose gradient adds the rows of equal ids up in float32 and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, sum_rows(grad.flatten(0, -2), ids.flatten(), ctx.num_rows)


def sum_rows_by_index_put(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """See sum_rows. CUDA sorts the ids; several threads of a CPU add in any order, and bits differ between runs."""
    result = torch.zeros(num_rows, rows.shape[1], dtype=torch.float32, device=rows.device)
    return result.index_put_((ids,), rows.float(), accumulate=True).to(rows.dtype)


def sum_rows_by_embedding_backward(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """See sum_rows. CUDA sorts the ids and adds many rows of one id in parts; a CPU adds in the rows' order."""
    wide = rows if rows.device.type == "cuda" else rows.float()  # torch adds in float32 by itself on CUDA alone
    return torch.ops.aten.embedding_dense_backward(wide, ids, num_rows, -1, False).to(rows.dtype)


SUM_ROWS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "index_put": sum_rows_by_index_put,
    "embedding_dense_backward": sum_rows_by_embedding_backward,
}
"""Ways to add up the embedding's gradient, for measuring."""

SUM_ROWS_METHOD = {"cpu": "embedding_dense_backward", "cuda": "index_put"}
"""The way that sum_rows takes per device type: repeatable bit for bit, and the same in every run."""


@torch.library.custom_op("gpt25::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D) whose row i is the sum of the rows (N, D) with id i, added in float32, in the rows' type.

    A compiler must not look inside: it would add atomically on CUDA, in any order, and a resumed run would not repeat
    its bits. In bfloat16 the thousandth occurrence of a word would no longer change a sum.
    """
    return SUM_ROWS[SUM_ROWS_METHOD.get(rows.device.type, "index_put")](rows, ids, num_rows)


@sum_rows.register_fake
def _(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return rows.new_empty(num_rows, rows.shape[1])


class RMSNorm(nn.Module):
    """x (..., D) / sqrt(mean(x^2) + eps) * weight, in float32, returned in x's dtype (arXiv 1910.07467)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of positions, (T, K/2) float32 each, or (B, T, K/2) where rows have positions of their own.

    A class of its own: tensors in tuples, lists and dicts would be cast to bfloat16 on their way into a sharded block.
    """

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> Rotation:
        """The rotation of other positions, (B, T) integers below those that this one has."""
        return Rotation(self.cos[positions], self.sin[positions])


@torch.library.custom_op("gpt25::rotary_angles", mutates_args=())
def rotary_angles(start: int, length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t theta^(-2i/K), (T, K/2) float32 each, t from start to start + length - 1.

    A compiler must not look inside: on CUDA it would compute power, cosine and sine anew wherever they are used, for
    every element of every layer, forward and backward: ten times the instructions of reading them.
    """
    positions = torch.arange(start, start + length, device=device, dtype=torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = positions[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


@rotary_angles.register_fake
def _(start: int, length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (length, (head_dim + 1) // 2)
    return torch.empty(shape, device=device), torch.empty(shape, device=device)


class RotaryEmbedding(nn.Module):
    """Turns pair (i, i + K/2) of the vector at position t by t theta^(-2i/K) (RoPE, arXiv 2104.09864, Llama's halves).

    Angles are float32 whatever x is: in bfloat16 neighbouring positions beyond 256 coincide. They are computed once a
    forward pass and kept nowhere: a buffer would be cast by model.bfloat16() and lost by to_empty.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    def angles(self, start: int, length: int, device: torch.device) -> Rotation:
        """Cosines and sines of the positions start .. start + length - 1."""
        return Rotation(*rotary_angles(start, length, self.head_dim, self.theta, device))

    def forward(self, x: Tensor, start: int = 0, rotation: Rotation | None = None) -> Tensor:
        """x (B, H, T, K) at positions start .. start + T - 1 -> the same shape and dtype.

        Args:
            rotation: self.angles of these positions; not given, they are computed.
        """
        rotation = self.angles(start, x.shape[-2], x.device) if rotation is None else rotation
        return rotate(x.transpose(-3, -2), rotation).transpose(-3, -2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, T, H, K) turned by a rotation of T positions, in float32 -> the same shape and dtype."""
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)  # (T, 1, K/2) or (B, T, 1, K/2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), (..., D) -> (..., D) by way of width F (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)  # (..., F) each
        return self.down_proj(gate * torch.sigmoid(gate) * up)


class LayerCache:
    """Keys and values of one attention layer for the positions seen so far, at most `capacity` of them.

    The memory, 2 B H capacity K numbers in the keys' dtype, is taken at the first append.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, H, T, K); returns all of them, (B, H, S, K). ValueError where they do not fit."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens exceed the cache's capacity of {self.capacity}; {self.length} are in it")
        if self._keys is None or self._values is None:
            batch, heads, _, width = keys.shape
            self._keys = keys.new_empty(batch, heads, self.capacity, width)
            self._values = values.new_empty(batch, heads, self.capacity, width)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head attention, each position to itself and those before it; queries and keys carry rotary positions.

    With qk_norm each head's query and key goes through an RMSNorm before its rotation, with one weight (K,) for all
    queries of the layer and one for all keys, as in Qwen3 (arXiv 2505.09388; the idea: arXiv 2302.05442). Scores are
    divided by sqrt(K) all the same: the weights learn any other scale.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(config.d_model, config.d_model)
        self.k_proj = Linear(config.d_model, config.d_model)
        self.v_proj = Linear(config.d_model, config.d_model)
        self.o_proj = Linear(config.d_model, config.d_model)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.rotary = RotaryEmbedding(config.head_dim, config.theta)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation | None = None, mask: Mask | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); with a cache, x goes on behind the positions that it holds, and is added to it.

        Args:
            rotation: self.rotary.angles of x's positions, the same for every layer; not given, they are computed.
            mask: what each position sees, in place of the causal mask; it goes without a cache.
        """
        start = 0 if cache is None else cache.length
        rotation = self.rotary.angles(start, x.shape[1], x.device) if rotation is None else rotation
        heads = (part.unflatten(-1, (self.num_heads, -1)) for part in project(x, self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = heads  # (B, T, H, K) each
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        # Turned as they lie: attention then gives its output, and takes its gradient, in this order without a copy.
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))  # (B, H, T, K)
        if cache is not None:
            keys, values = cache.append(keys, values)
        if isinstance(mask, BlockMask):
            mixed = flex_attention(queries, keys, values, block_mask=mask)
            return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)
        # is_causal puts the diagonal at the top left, which is right for as many keys as queries only.
        is_causal = start == 0 and mask is None
        if not is_causal and mask is None and x.shape[1] > 1:
            mask = causal_mask(x.shape[1], start, x.device)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)


def causal_mask(num_queries: int, start: int, device: torch.device) -> Tensor:
    """(T, S = start + T) bool: query t, at position start + t, sees the keys 0 .. start + t."""
    positions = torch.arange(start + num_queries, device=device)
    return positions[None, :] <= positions[start:, None]


def document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T) bool for documents (B, T): query t sees the keys 0 .. t that are of its document."""
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (same & causal_mask(documents.shape[1], 0, documents.device))[:, None]


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) over its sum along dim, in x's dtype; the largest entry is subtracted first, so that nothing overflows."""
    weights = (x - x.amax(dim=dim, keepdim=True)).exp()
    return weights / weights.sum(dim=dim, keepdim=True)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention by its definition, softmax(Q K^T / sqrt(K)) V: what the fast kernel is tested against.

    queries (B, H, T, K), keys and values (B, H, S, K), the queries being the last T positions -> (B, H, T, K).
    """
    num_queries, num_keys = queries.shape[-2], keys.shape[-2]
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5  # (B, H, T, S)
    hidden = ~causal_mask(num_queries, num_keys - num_queries, queries.device)
    return softmax(scores.masked_fill(hidden, float("-inf"))) @ values


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """Mean negative log-likelihood in nats, float32 inside whatever the logits are; no target is ignored.

    Backward overwrites the logits with their gradient: of everything in a training step they take the most memory
    (3.3 GB for 32 x 1,024 x 50,304 in bfloat16), and this way they take it once. So the caller gives them up. A second
    backward through the same graph raises torch's RuntimeError about a modified tensor; compiled by inductor it is not
    noticed, and wrong.

    Args:
        logits: (N, P).
        targets: (N,) int64, each in [0, vocab_size).
        vocab_size: columns that are real; the rest is left out of the sum and gets gradient zero. Not given: P.
    """
    return _CrossEntropy.apply(logits, targets, logits.shape[1] if vocab_size is None else vocab_size)


class _CrossEntropy(torch.autograd.Function):
    """loss = mean(log sum exp z - z_target); dloss/dz = (softmax(z) - one_hot(target)) / N."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        log_sums = torch.cat([_log_sum_exp(logits[rows, :vocab_size]) for rows in _row_chunks(logits)])  # (N,)
        target_logits = logits[:, :vocab_size].gather(1, targets[:, None])[:, 0]
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.vocab_size = vocab_size
        return (log_sums - target_logits.float()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sums = ctx.saved_tensors
        scale = grad_loss / targets.shape[0]
        ids = torch.arange(ctx.vocab_size, device=logits.device)
        for rows in _row_chunks(logits):
            real = logits[rows, : ctx.vocab_size]
            gradient = (real.float() - log_sums[rows, None]).exp()  # softmax
            gradient = (gradient - (targets[rows, None] == ids).float()) * scale
            real.copy_(gradient)
        logits[:, ctx.vocab_size :] = 0
        return logits, None, None


def _log_sum_exp(logits: Tensor) -> Tensor:
    wide = logits.float()
    largest = wide.amax(dim=1, keepdim=True)
    return (wide - largest).exp().sum(dim=1).log() + largest[:, 0]


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, LOSS_CHUNK_ELEMENTS numbers at a time; all in one under torch.compile, which fuses instead."""
    num_rows, num_columns = logits.shape
    size = num_rows if torch.compiler.is_compiling() else max(1, LOSS_CHUNK_ELEMENTS // num_columns)
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))
