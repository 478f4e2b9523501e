"""The network for generation alone: several sequences of different lengths are decoded, one token of each at a time.

What Transformer computes, with less around it: projections that read the same input are one matrix, positions are
turned by a table, keys and values lie in one growing block per layer, only the positions that are asked for go through
the output matrix, and where just the likeliest token is wanted, most of that matrix is not read (greedy.py). A token
for a few texts then costs little more than reading the weights once; more texts share that reading. Tested against
Transformer (tests/model/test_decoding.py).

Shapes: B texts, T time, S time seen so far, C capacity, D model, H heads, K head dim, F feed-forward, V vocab.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.greedy import GreedySearch
from model.transformer import Block, Transformer

FIRST_CAPACITY = 128
"""Positions that the cache begins with; it doubles up to context_length."""

TYPICAL_TEXTS = 16
"""For which the order of the weights is chosen."""


class Decoder:
    """Weights packed for generation, and the keys and values of the sequences being decoded.

    Texts are rows 0 .. num_texts - 1, always without a gap: when one is removed, the last takes its row. The weights
    are copies: later changes of the model are not seen. Not for sharded models, and not to be shared between threads.

    Args:
        model: on the device that is to compute.
        dtype: of the matrix products and of the cache; norms and the residual stream are float32 always.
        texts: how many are expected at a time; any number works, but one alone is fastest with 1.
    """

    def __init__(self, model: Transformer, *, dtype: torch.dtype = torch.float32, texts: int = TYPICAL_TEXTS) -> None:
        self.config = config = model.config
        self.dtype = dtype
        self.device = model.embedding.weight.device
        self.lengths: list[int] = []
        """Positions held by each text."""
        self._texts = texts
        with torch.no_grad():
            self._embedding = _copy(model.embedding.weight[: config.vocab_size], dtype)  # (V, D)
            self._output_weight = self._embedding  # (V, D)
            if model.output is not None:
                self._output_weight = _copy(model.output.weight[: config.vocab_size], dtype)
            self._norm = _Norm(model.norm.weight, config.norm_eps)
            self._layers = [_Layer(block, config, dtype, texts) for block in model.blocks]  # type: ignore[arg-type]
            self._scratch = _Scratch(config) if self._layers[0].is_vector else None
            self._turns = _turns(config, self.device)
        shape = (2, 0, config.num_heads, 0, config.head_dim)
        self._memories = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in self._layers]
        """Keys, then values, layer by layer: (2, rows, H, C, K)."""

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into new rows after the others; returns the logits (B, V), float32, of the token after each.

        ValueError where one is empty or longer than the context.
        """
        return self._logits(self._read(prompts))

    def step(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Append one token (B,) int64 to each text from row ``first`` on; returns the logits (B, V), float32, after it.

        ValueError where a text has no room for it.
        """
        return self._logits(self._advance(tokens, first))

    def add_greedy(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As add; returns the likeliest ids (B,) int64, the lowest among equals: add(prompts).argmax(-1), sooner."""
        return self._likeliest(self._read(prompts))

    def step_greedy(self, tokens: Tensor, first: int = 0) -> Tensor:
        """As step; returns the likeliest ids (B,) int64, the lowest among equals: step(tokens).argmax(-1), sooner."""
        return self._likeliest(self._advance(tokens, first))

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Remove a text; the last one moves into its row."""
        last = self.num_texts - 1
        if row != last:
            length = self.lengths[row] = self.lengths[last]
            for memory in self._memories:
                memory[:, row, :, :length] = memory[:, last, :, :length]
        self.lengths.pop()

    @torch.inference_mode()
    def swap(self, row: int, other: int) -> None:
        """Let two texts change their rows."""
        length = max(self.lengths[row], self.lengths[other])
        for memory in self._memories:
            both = memory[:, [row, other], :, :length]  # a copy
            memory[:, row, :, :length], memory[:, other, :, :length] = both[:, 1], both[:, 0]
        self.lengths[row], self.lengths[other] = self.lengths[other], self.lengths[row]

    @torch.inference_mode()
    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The last hidden state (B, D) of each prompt, normed, in ``dtype``."""
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) < 1 or max(lengths) > self.config.context_length:
            raise ValueError(f"prompts of {lengths} tokens; each must have 1 to {self.config.context_length}")
        rows, longest = slice(self.num_texts, self.num_texts + len(prompts)), max(lengths)
        # Shorter prompts are filled up on the right: under the causal mask no real position sees what follows it, and
        # the keys and values of the filling are hidden until the text overwrites them.
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        self._make_room(rows.stop, max([longest, *self.lengths]))
        turn = self._turns[:longest, None, None]  # (T, 1, 1, K/2) complex
        x = self._embedding[tokens].float()  # (B, T, D)
        for layer, memory in zip(self._layers, self._memories, strict=True):
            x = layer.read(x, memory[:, rows, :, :longest], turn)
        self.lengths += lengths
        last = torch.tensor(lengths, device=self.device) - 1
        return self._normed(x[torch.arange(len(prompts), device=self.device), last])

    @torch.inference_mode()
    def _advance(self, tokens: Tensor, first: int) -> Tensor:
        """The hidden state (B, D) of the new token of each text from row ``first`` on, normed, in ``dtype``."""
        lengths = self.lengths[first:]
        longest = max(lengths) + 1
        if longest > self.config.context_length:
            raise ValueError(f"a text already has the context_length of {self.config.context_length} tokens")
        self._make_room(self.num_texts, longest)
        now = self._now(lengths)
        x = self._embedding[tokens].float()  # (B, D)
        scratch = self._scratch if len(lengths) == 1 else None
        for layer, memory in zip(self._layers, self._memories, strict=True):
            x = layer.step(x, memory.narrow(1, first, len(lengths)).narrow(3, 0, longest), now, scratch)
        self.lengths[first:] = [length + 1 for length in lengths]
        return self._normed(x)

    def _now(self, lengths: list[int]) -> _Now:
        longest = max(lengths) + 1
        if min(lengths) + 1 == longest:
            return _Now(turn=self._turns[longest - 1], places=None, mask=None)
        positions = torch.tensor(lengths, device=self.device)
        hidden = torch.arange(longest, device=self.device) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        rows = torch.arange(len(lengths), device=self.device)
        return _Now(turn=self._turns[positions, None, None], places=(rows, positions), mask=mask[:, None, None])

    def _make_room(self, num_rows: int, length: int) -> None:
        """Capacity for that many texts and positions; it grows geometrically, so that little is copied."""
        _, rows, _, capacity, _ = self._memories[0].shape
        if num_rows <= rows and length <= capacity:
            return
        if num_rows > rows:
            rows = max(num_rows, min(2 * rows, TYPICAL_TEXTS), rows + rows // 8)
        while length > capacity:
            capacity = min(max(FIRST_CAPACITY, 2 * capacity), self.config.context_length)
        for index, old in enumerate(self._memories):
            # Zeros: what is masked is multiplied by nothing, and nothing times a stray infinity would be NaN.
            grown = old.new_zeros(2, rows, self.config.num_heads, capacity, self.config.head_dim)
            grown[:, : old.shape[1], :, : old.shape[3]] = old
            self._memories[index] = grown

    def _normed(self, x: Tensor) -> Tensor:
        return self._norm(x).to(self.dtype)

    @torch.inference_mode()
    def _logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, V) float32."""
        return self._output(x).float()

    @torch.inference_mode()
    def _likeliest(self, x: Tensor) -> Tensor:
        """(B, D) -> (B,) int64."""
        found = None if self._search is None else self._search(x)
        return self._logits(x).argmax(dim=-1) if found is None else found

    @functools.cached_property
    def _output(self) -> _Matrix:
        # Packed when first needed: greedy texts rarely are in need of it.
        return _Matrix([self._output_weight], self.dtype, self._texts)

    @functools.cached_property
    def _search(self) -> GreedySearch | None:
        is_possible = self.device.type == "cpu" and GreedySearch.is_available()
        return GreedySearch(self._output_weight) if is_possible else None


@dataclass(frozen=True, kw_only=True)
class _Now:
    """Where the texts are in one step; the same for every layer."""

    turn: Tensor
    """(B, 1, 1, K/2) complex, or (K/2,) where it is the same for all: the rotation of each text's new position."""
    places: tuple[Tensor, Tensor] | None
    """Row and position (B,) of each new token; None where all have the last position."""
    mask: Tensor | None
    """(B, 1, 1, S): 0 where a text's keys are, -inf behind them; None where all have the same length."""


class _Joined:
    """What the first product of a layer holds: values (..., 3 H K), float32; the rest are views of it."""

    def __init__(self, values: Tensor, num_heads: int) -> None:
        self.values = values
        self.heads = values.unflatten(-1, (3, num_heads, -1))
        """(..., 3, H, K)"""
        self.turned = torch.view_as_complex(self.heads.unflatten(-1, (-1, 2)))[..., :2, :, :]
        """Queries and keys (..., 2, H, K/2), complex: what the rotation multiplies."""
        self.queries = self.heads[..., 0, :, None, :]
        """(..., H, 1, K)"""
        self.keys_values = self.heads[..., 1:, :, :].movedim(-3, 0)
        """(2, ..., H, K)"""


class _Scratch:
    """For one text in float32 on a CPU: where every layer puts what it computes, without making tensors and views."""

    def __init__(self, config: ModelConfig) -> None:
        self.joined = _Joined(torch.empty(1, 3 * config.num_heads * config.head_dim), config.num_heads)
        self.gate_up = torch.empty(1, 2 * config.d_ff)
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)
        self.hidden = torch.empty(1, config.d_ff)


class _Layer:
    """One block, its weights packed."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype, texts: int) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.num_heads, self.dtype = config.num_heads, dtype
        attention_norm = _Norm(block.attention_norm.weight, config.norm_eps)
        feed_forward_norm = _Norm(block.feed_forward_norm.weight, config.norm_eps)
        queries, keys = (_paired(each.weight, config) for each in (attention.q_proj, attention.k_proj))
        self.qk_norm = None
        if attention.q_norm is not None and attention.k_norm is not None:
            self.qk_norm = _HeadNorm([attention.q_norm.weight, attention.k_norm.weight], config)
        self.qkv = _NormedMatrix(attention_norm, [queries, keys, attention.v_proj.weight], dtype, texts)
        self.o = _Matrix([attention.o_proj.weight], dtype, texts)
        gate_up = [feed_forward.gate_proj.weight, feed_forward.up_proj.weight]
        self.gate_up = _NormedMatrix(feed_forward_norm, gate_up, dtype, texts)
        self.down = _Matrix([feed_forward.down_proj.weight], dtype, texts)

    @property
    def is_vector(self) -> bool:
        return self.o.is_vector

    def read(self, x: Tensor, memory: Tensor, turn: Tensor) -> Tensor:
        """Whole prompts x (B, T, D), changed in place; keys and values go to memory (2, B, H, T, K)."""
        joined = _Joined(self.qkv(x).float(), self.num_heads)
        self._turn(joined, turn)
        memory.copy_(joined.keys_values.transpose(2, 3))
        queries = joined.heads[:, :, 0].transpose(1, 2).to(self.dtype)  # (B, H, T, K)
        mixed = F.scaled_dot_product_attention(queries, memory[0], memory[1], is_causal=True)
        self.o.add_to(x, mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        self.down.add_to(x, torch.sigmoid(gate).mul_(gate).mul_(up))
        return x

    def step(self, x: Tensor, memory: Tensor, now: _Now, scratch: _Scratch | None) -> Tensor:
        """One token a text: x (B, D), changed in place; memory (2, B, H, S, K) gets its key and value."""
        if scratch is None:
            joined = _Joined(self.qkv(x).float(), self.num_heads)
        else:
            joined = scratch.joined
            self.qkv.into(joined.values, x)
        self._turn(joined, now.turn)
        if now.places is None:
            memory.select(3, -1).copy_(joined.keys_values)
        else:
            rows, positions = now.places
            memory[:, rows, :, positions] = joined.heads[:, 1:].to(self.dtype)
        keys, values = memory.unbind()
        mixed = F.scaled_dot_product_attention(joined.queries.to(self.dtype), keys, values, attn_mask=now.mask)
        self.o.add_to(x, mixed.flatten(1))
        if scratch is None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, F) each
            hidden = torch.sigmoid(gate)
        else:
            self.gate_up.into(scratch.gate_up, x)
            gate, up = scratch.gate, scratch.up
            hidden = torch.sigmoid(gate, out=scratch.hidden)
        self.down.add_to(x, hidden.mul_(gate).mul_(up))
        return x

    def _turn(self, joined: _Joined, turn: Tensor) -> None:
        """Queries and keys, normed where the network does so, to their positions; in place."""
        if self.qk_norm is not None:
            self.qk_norm(joined.heads[..., :2, :, :])
        joined.turned.mul_(turn)


class _Norm:
    """As layers.RMSNorm, for float32: x w sqrt(D) / sqrt(|x|^2 + D eps).

    Each operation costs a few times its work here, because reading the weights has pushed its code out of the cache;
    these are four, those of F.rms_norm six.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        width = weight.shape[0]
        self.weight = _copy(weight, torch.float32) * math.sqrt(width)
        self.least = math.sqrt(width * eps)
        self._least = torch.tensor(self.least, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scaled(x).mul_(self.weight)

    def scaled(self, x: Tensor) -> Tensor:
        """x / sqrt(|x|^2 + D eps): without the weights."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._least)


class _HeadNorm:
    """layers.RMSNorm of each head's query and key, (..., 2, H, K) float32, in place.

    Args:
        weights: q_norm's and k_norm's, (K,) each; they are put into the order of _paired.
    """

    def __init__(self, weights: Sequence[Tensor], config: ModelConfig) -> None:
        pairs = torch.stack([_copy(each, torch.float32) for each in weights]).unflatten(-1, (2, -1))
        self.weight = pairs.transpose(-2, -1).flatten(-2)[:, None]  # (2, 1, K)
        self.eps = config.norm_eps

    def __call__(self, x: Tensor) -> None:
        x.mul_(torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)).mul_(self.weight)


class _Matrix:
    """x (..., in) -> x W^T (..., out) for the rows of several weights together.

    On a CPU the weight lies in the order in which oneDNN's products read it: for 16 texts of 124M parameters a step
    takes three quarters of the time (benchmarks/generation.py). One text in float32 is read by BLAS, which takes four
    fifths of oneDNN's time for a vector.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, texts: int) -> None:
        weight = torch.cat([each.detach() for each in weights]).to(dtype, copy=True)
        is_cpu = weight.device.type == "cpu"
        self.is_vector = is_cpu and texts == 1 and dtype == torch.float32
        self._packs = is_cpu and torch.backends.mkldnn.is_available() and not self.is_vector
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_TEXTS) if self._packs else weight.T

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packs:
            return x @ self.weight
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total (..., out) += x W^T."""
        if self.is_vector:  # one operation
            total.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight)
        else:
            total += self(x)


class _NormedMatrix:
    """A norm, then a matrix.

    For one text in float32 on a CPU, the weights of the norm are in the matrix, and a step is two operations: the
    product takes the norm's number as a factor.
    """

    def __init__(self, norm: _Norm, weights: Sequence[Tensor], dtype: torch.dtype, texts: int) -> None:
        self._norm, self._dtype = norm, dtype
        self._matrix = _Matrix(weights, dtype, texts)
        if self._matrix.is_vector:
            self._matrix.weight = self._matrix.weight * norm.weight[:, None]
            self._nothing = self._matrix.weight.new_zeros(1)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., D), float32 -> (..., out) in the dtype of the matrix."""
        if self._matrix.is_vector:
            return self._matrix(self._norm.scaled(x))
        return self._matrix(self._norm(x).to(self._dtype))

    def into(self, product: Tensor, x: Tensor) -> None:
        """The same for one text in float32 on a CPU: x (1, D) -> product (1, out)."""
        size = math.hypot(torch.linalg.vector_norm(x).item(), self._norm.least)
        torch.addmm(self._nothing, x, self._matrix.weight, beta=0, alpha=1 / size, out=product)


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True)


def _turns(config: ModelConfig, device: torch.device) -> Tensor:
    """(context_length, K/2) complex64: e^(i t theta^(-2j/K)), the angles of layers.RotaryEmbedding."""
    positions = torch.arange(config.context_length, device=device, dtype=torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None] * (1.0 / config.theta**exponents)
    return torch.complex(angles.cos(), angles.sin())


def _paired(weight: Tensor, config: ModelConfig) -> Tensor:
    """Rows of a projection (H K, D) in another order: pair (j, j + K/2), which is turned together, side by side.

    What is turned is then a complex number where it lies; queries and keys in the same order have the same products.
    """
    return weight.unflatten(0, (config.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
