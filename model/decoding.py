"""The network once more, for generation alone: several texts of different lengths grow by one token at a time.

What Transformer computes, with less around it: projections that read the same input are one matrix, positions are
turned by a table, keys and values lie in one growing block per layer, and only the positions that are asked for go
through the output matrix. A token for a few texts then costs little more than reading the weights once, which is the
floor; more texts share that reading. Tested against Transformer (tests/model/test_decoding.py).

Below that floor leads drafting (arXiv 2211.17192, with the network as its own draft): int8 copies of the weights, a
quarter of the bytes, guess the next few tokens, and the exact weights check them all in one reading (batching.py).

Shapes: B texts, N new tokens of each, T time, S time seen so far, C capacity, D model, H heads, K head dim,
F feed-forward, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Block, Transformer

FIRST_CAPACITY = 128
"""Positions that the cache begins with; it doubles up to context_length."""

TYPICAL_TEXTS = 16
"""For which the order of the weights is chosen; any number works."""

INT8_ROWS = 0
"""Up to so many, drafts read int8 weights; for more, bfloat16 is faster, whose products the processor has."""

DRAFTING_BYTES = 1 << 27
"""Of float32 weights from which on drafting pays: they come from memory, not from a cache."""


class Decoder:
    """Weights packed for generation, and the keys and values of the texts that are being written.

    Texts are rows 0 .. num_texts - 1, always without a gap: when one is removed, the last takes its row. The weights
    are copies: later changes of the model are not seen. Not for sharded models, and not to be shared between threads.

    Args:
        model: on the device that is to compute.
        dtype: of the matrix products and of the cache; norms and the residual stream are float32 always.
        drafts: keep int8 copies of the weights for drafting. Not given: where that pays, see ``drafting_pays``.
    """

    def __init__(self, model: Transformer, *, dtype: torch.dtype = torch.float32, drafts: bool | None = None) -> None:
        self.config = model.config
        self.dtype = dtype
        self.drafts = drafting_pays(model, dtype) if drafts is None else drafts
        self.device = model.embedding.weight.device
        self.lengths: list[int] = []
        """Positions held, text by text."""
        with torch.no_grad():
            self._embedding = _copy(model.embedding.weight[: self.config.vocab_size], dtype)  # (V, D)
            output = model.embedding if model.output is None else model.output
            self._output = _Projection([output.weight[: self.config.vocab_size]], dtype, self.drafts)
            self._norm = _copy(model.norm.weight, torch.float32)
            self._layers = [_Layer(block, self.config, dtype, self.drafts) for block in model.blocks]  # type: ignore[arg-type]
            self._turns = _turns(self.config, self.device)

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    @torch.no_grad()
    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into new rows behind the others; returns the logits (B, V), float32, of what follows each.

        ValueError where one is empty or longer than the context.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) < 1 or max(lengths) > self.config.context_length:
            raise ValueError(f"prompts of {lengths} tokens; each must have 1 to {self.config.context_length}")
        rows, longest = slice(self.num_texts, self.num_texts + len(prompts)), max(lengths)
        # Shorter prompts are filled up on the right: under the causal mask no real position sees what follows it, and
        # the keys and values of the filling are hidden until the growing text overwrites them.
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        turn = self._turns[:longest, None]  # (T, 1, K/2) complex
        x = self._embedding[tokens].float()  # (B, T, D)
        for layer in self._layers:
            layer.make_room(rows.stop, max([longest, *self.lengths]))
            x = layer.read(x, turn, rows)
        self.lengths += lengths
        last = torch.tensor(lengths, device=self.device) - 1
        return self._logits(x[torch.arange(len(prompts), device=self.device), last])

    def step(self, tokens: Tensor) -> Tensor:
        """Put one token (B,) int64 behind each text; returns the logits (B, V), float32, of the next.

        ValueError where a text has no room for it.
        """
        return self.extend(tokens[:, None])[:, 0]

    @torch.no_grad()
    def extend(self, tokens: Tensor, *, draft: bool = False) -> Tensor:
        """Put tokens (B, N) int64 behind each text; returns the logits (B, N, V), float32, of what follows each.

        Args:
            draft: with the int8 weights; take such tokens away again (``cut``) before exact ones follow.

        ValueError where a text has no room for them.
        """
        count = tokens.shape[1]
        longest = max(self.lengths) + count
        if longest > self.config.context_length:
            raise ValueError(
                f"{count} more tokens do not fit behind a text of {max(self.lengths)} tokens: that is more than the "
                f"context_length of {self.config.context_length}"
            )
        starts = torch.tensor(self.lengths, device=self.device)
        positions = starts[:, None] + torch.arange(count, device=self.device)  # (B, N)
        are_equal = min(self.lengths) == max(self.lengths)
        now = _Now(
            turn=self._turns[positions, None],  # (B, N, 1, K/2) complex
            positions=None if are_equal else positions,
            start=longest - count,
            longest=longest,
            mask=None if are_equal and count == 1 else self._mask(positions, longest),
            draft=draft,
        )
        x = self._embedding[tokens].float()  # (B, N, D)
        for layer in self._layers:
            layer.make_room(self.num_texts, longest)
            x = layer.step(x, now)
        self.lengths = [length + count for length in self.lengths]
        return self._logits(x, draft=draft)

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget what each text has behind its first ``lengths`` tokens."""
        self.lengths = list(lengths)

    def remove(self, row: int) -> None:
        """Forget a text; the last one moves into its row."""
        last = self.num_texts - 1
        if row != last:
            for layer in self._layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def _mask(self, positions: Tensor, longest: int) -> Tensor:
        """(B, 1, N, S): 0 where keys are that positions (B, N) may see, -inf behind them."""
        hidden = torch.arange(longest, device=self.device) > positions[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None]

    def _logits(self, x: Tensor, *, draft: bool = False) -> Tensor:
        """(..., D) -> (..., V)."""
        x = _rms_norm(x, self._norm, self.config.norm_eps).to(self.dtype)
        return self._output(x, draft).float()


def drafting_pays(model: Transformer, dtype: torch.dtype) -> bool:
    """Whether reading the weights is what a token costs: in float32, on a CPU, too many for its caches."""
    num_bytes = model.config.num_parameters * dtype.itemsize
    on_cpu = model.embedding.weight.device.type == "cpu"
    return on_cpu and dtype == torch.float32 and num_bytes >= DRAFTING_BYTES


@dataclass(frozen=True, kw_only=True)
class _Now:
    """Where the texts are in one step; the same for every layer."""

    turn: Tensor
    """(B, N, 1, K/2) complex: the rotation of each new position."""
    positions: Tensor | None
    """(B, N) of the new tokens; None where all texts have the same."""
    start: int
    """The first new position of the longest text."""
    longest: int
    """Keys of the longest text, the new ones included."""
    mask: Tensor | None
    draft: bool


class _Layer:
    """One block: packed weights, keys and values."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype, drafts: bool) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.config = config
        self.attention_norm = _copy(block.attention_norm.weight, torch.float32)
        self.feed_forward_norm = _copy(block.feed_forward_norm.weight, torch.float32)
        joined = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.qkv = _Projection(joined, dtype, drafts)
        self.o = _Projection([attention.o_proj.weight], dtype, drafts)
        self.gate_up = _Projection([feed_forward.gate_proj.weight, feed_forward.up_proj.weight], dtype, drafts)
        self.down = _Projection([feed_forward.down_proj.weight], dtype, drafts)
        self.dtype = dtype
        # Keys, then values: (2, rows, H, C, K).
        shape = (2, 0, config.num_heads, 0, config.head_dim)
        self.memory = torch.zeros(shape, dtype=dtype, device=self.attention_norm.device)

    def read(self, x: Tensor, turn: Tensor, rows: slice) -> Tensor:
        """Whole prompts x (B, T, D) into ``rows``."""
        queries, keys, values = self._project(x, turn)  # (B, T, H, K) each
        self.memory[0, rows, :, : x.shape[1]] = keys.transpose(1, 2)
        self.memory[1, rows, :, : x.shape[1]] = values.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True
        )
        return self._finish(x, mixed.transpose(1, 2))

    def step(self, x: Tensor, now: _Now) -> Tensor:
        """A few tokens behind each text: x (B, N, D)."""
        queries, keys, values = self._project(x, now.turn, draft=now.draft)  # (B, N, H, K) each
        count = x.shape[0]
        if now.positions is None:
            self.memory[0, :count, :, now.start : now.longest] = keys.transpose(1, 2)
            self.memory[1, :count, :, now.start : now.longest] = values.transpose(1, 2)
        else:
            rows = torch.arange(count, device=x.device)[:, None]
            self.memory[0, rows, :, now.positions] = keys
            self.memory[1, rows, :, now.positions] = values
        known = self.memory[:, :count, :, : now.longest]  # (2, B, H, S, K)
        mixed = F.scaled_dot_product_attention(queries.transpose(1, 2), known[0], known[1], attn_mask=now.mask)
        return self._finish(x, mixed.transpose(1, 2), draft=now.draft)

    def move(self, source: int, target: int, length: int) -> None:
        self.memory[:, target, :, :length] = self.memory[:, source, :, :length]

    def make_room(self, num_rows: int, length: int) -> None:
        """Capacity in both directions, doubled when it does not suffice."""
        _, rows, _, capacity, _ = self.memory.shape
        if num_rows <= rows and length <= capacity:
            return
        if num_rows > rows:
            rows = max(num_rows, 2 * rows)
        while length > capacity:
            capacity = min(max(FIRST_CAPACITY, 2 * capacity), self.config.context_length)
        # Zeros: what is masked is multiplied by nothing, and nothing times a stray infinity would be NaN.
        grown = self.memory.new_zeros(2, rows, self.config.num_heads, capacity, self.config.head_dim)
        grown[:, : self.memory.shape[1], :, : self.memory.shape[3]] = self.memory
        self.memory = grown

    def _project(self, x: Tensor, turn: Tensor, *, draft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> queries, keys, turned, and values, (..., H, K) each."""
        normed = _rms_norm(x, self.attention_norm, self.config.norm_eps).to(self.dtype)
        joined = self.qkv(normed, draft).unflatten(-1, (3, self.config.num_heads, -1))  # (..., 3, H, K)
        queries, keys, values = joined.unbind(-3)
        return _rotate(queries, turn), _rotate(keys, turn), values

    def _finish(self, x: Tensor, mixed: Tensor, *, draft: bool = False) -> Tensor:
        """What follows the mixing of values (..., H, K): output projection, feed-forward."""
        x = x + self.o(mixed.reshape(*x.shape[:-1], -1), draft).float()
        normed = _rms_norm(x, self.feed_forward_norm, self.config.norm_eps).to(self.dtype)
        gate, up = self.gate_up(normed, draft).chunk(2, dim=-1)  # (..., F) each
        return x + self.down(gate * torch.sigmoid(gate) * up, draft).float()


class _Projection:
    """x (..., in) -> x W^T (..., out) for the rows of several weights together; exact, or with a rough copy of W."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, drafts: bool) -> None:
        weight = torch.cat([each.detach() for each in weights]).to(dtype, copy=True)
        self._exact = _Matrix(weight)
        self._rough = _Matrix(weight.bfloat16()) if drafts else None
        self._rougher = _Int8Matrix(weight) if drafts else None

    def __call__(self, x: Tensor, draft: bool = False) -> Tensor:
        if not draft:
            return self._exact(x)
        assert self._rough is not None and self._rougher is not None
        few = x.shape[:-1].numel() <= INT8_ROWS
        return (self._rougher if few else self._rough)(x.bfloat16()).to(x.dtype)


class _Matrix:
    """On a CPU the weight (out, in) lies in the order in which oneDNN's products read it: for 16 texts of 124M
    parameters a step takes three quarters of the time (benchmarks/generation.py)."""

    def __init__(self, weight: Tensor) -> None:
        self._packs = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_TEXTS) if self._packs else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packs:
            return x @ self._weight.T
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


class _Int8Matrix:
    """The weight (out, in) as int8 with a bfloat16 scale for each row: the largest of a row becomes 127."""

    def __init__(self, weight: Tensor) -> None:
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self._weight = (weight / scales[:, None]).round().to(torch.int8)
        self._scales = scales.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) bfloat16 -> (..., out) bfloat16."""
        product: Tensor = torch._weight_int8pack_mm(x.flatten(end_dim=-2), self._weight, self._scales)
        return product.unflatten(0, x.shape[:-1])


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As layers.RMSNorm, for float32."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _turns(config: ModelConfig, device: torch.device) -> Tensor:
    """(context_length, K/2) complex64: e^(i t theta^(-2j/K)), the angles of layers.RotaryEmbedding."""
    positions = torch.arange(config.context_length, device=device, dtype=torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None] * (1.0 / config.theta**exponents)
    return torch.complex(angles.cos(), angles.sin())


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (..., H, K) with pair (j, j + K/2) turned by turn (..., 1, K/2)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
