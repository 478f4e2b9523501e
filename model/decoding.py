"""The network once more, for generation alone: several texts of different lengths grow by one token at a time.

What Transformer computes, with less around it: projections that read the same input are one matrix, positions are
turned by a table, keys and values lie in one growing block per layer, and only the positions that are asked for go
through the output matrix. A token for a few texts then costs little more than reading the weights once, which is the
floor; more texts share that reading. Tested against Transformer (tests/model/test_decoding.py).

Shapes: B texts, T time, S time seen so far, C capacity, D model, H heads, K head dim, F feed-forward, V vocab.
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
"""For which the order of the weights is chosen."""


class Decoder:
    """Weights packed for generation, and the keys and values of the texts that are being written.

    Texts are rows 0 .. num_texts - 1, always without a gap: when one is removed, the last takes its row. The weights
    are copies: later changes of the model are not seen. Not for sharded models, and not to be shared between threads.

    Args:
        model: on the device that is to compute.
        dtype: of the matrix products and of the cache; norms and the residual stream are float32 always.
        texts: how many are expected at a time; any number works, but one alone is fastest with 1.
    """

    def __init__(self, model: Transformer, *, dtype: torch.dtype = torch.float32, texts: int = TYPICAL_TEXTS) -> None:
        self.config = model.config
        self.dtype = dtype
        self.device = model.embedding.weight.device
        self.lengths: list[int] = []
        """Positions held, text by text."""
        with torch.no_grad():
            self._embedding = _copy(model.embedding.weight[: self.config.vocab_size], dtype)  # (V, D)
            output = model.embedding if model.output is None else model.output
            self._output = _Matrix([output.weight[: self.config.vocab_size]], dtype, texts)
            self._norm = _copy(model.norm.weight, torch.float32)
            self._layers = [_Layer(block, self.config, dtype, texts) for block in model.blocks]  # type: ignore[arg-type]
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

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Put one token (B,) int64 behind each text; returns the logits (B, V), float32, of the next.

        ValueError where a text has no room for it.
        """
        longest = max(self.lengths) + 1
        if longest > self.config.context_length:
            raise ValueError(f"a text already has the context_length of {self.config.context_length} tokens")
        positions = torch.tensor(self.lengths, device=self.device)
        now = _Now(
            turn=self._turns[positions, None],  # (B, 1, K/2) complex
            positions=positions if min(self.lengths) + 1 < longest else None,
            longest=longest,
            mask=self._mask(positions, longest) if min(self.lengths) + 1 < longest else None,
        )
        x = self._embedding[tokens].float()  # (B, D)
        for layer in self._layers:
            layer.make_room(self.num_texts, longest)
            x = layer.step(x, now)
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits(x)

    def remove(self, row: int) -> None:
        """Forget a text; the last one moves into its row."""
        last = self.num_texts - 1
        if row != last:
            for layer in self._layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def _mask(self, positions: Tensor, longest: int) -> Tensor:
        """(B, 1, 1, S): 0 where a text's keys are, -inf behind them."""
        hidden = torch.arange(longest, device=self.device) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def _logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, V)."""
        x = _rms_norm(x, self._norm, self.config.norm_eps).to(self.dtype)
        return self._output(x).float()


@dataclass(frozen=True, kw_only=True)
class _Now:
    """Where the texts are in one step; the same for every layer."""

    turn: Tensor
    """(B, 1, K/2) complex: the rotation of each text's new position."""
    positions: Tensor | None
    """(B,) of the new token; None where all texts have the same."""
    longest: int
    """Keys of the longest text, the new one included."""
    mask: Tensor | None


class _Layer:
    """One block: packed weights, keys and values."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype, texts: int) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.config = config
        self.attention_norm = _copy(block.attention_norm.weight, torch.float32)
        self.feed_forward_norm = _copy(block.feed_forward_norm.weight, torch.float32)
        self.qkv = _Matrix([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight], dtype, texts)
        self.o = _Matrix([attention.o_proj.weight], dtype, texts)
        self.gate_up = _Matrix([feed_forward.gate_proj.weight, feed_forward.up_proj.weight], dtype, texts)
        self.down = _Matrix([feed_forward.down_proj.weight], dtype, texts)
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
        """One token a text: x (B, D)."""
        queries, keys, values = self._project(x, now.turn)  # (B, H, K) each
        count = x.shape[0]
        if now.positions is None:
            self.memory[0, :count, :, now.longest - 1] = keys
            self.memory[1, :count, :, now.longest - 1] = values
        else:
            rows = torch.arange(count, device=x.device)
            self.memory[0, rows, :, now.positions] = keys
            self.memory[1, rows, :, now.positions] = values
        known = self.memory[:, :count, :, : now.longest]  # (2, B, H, S, K)
        mixed = F.scaled_dot_product_attention(queries[:, :, None], known[0], known[1], attn_mask=now.mask)
        return self._finish(x, mixed)

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

    def _project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> queries, keys, turned, and values, (..., H, K) each."""
        normed = _rms_norm(x, self.attention_norm, self.config.norm_eps).to(self.dtype)
        joined = self.qkv(normed).unflatten(-1, (3, self.config.num_heads, -1))  # (..., 3, H, K)
        queries, keys, values = joined.unbind(-3)
        return _rotate(queries, turn), _rotate(keys, turn), values

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the mixing of values (..., H, K): output projection, feed-forward."""
        x = x + self.o(mixed.reshape(*x.shape[:-1], -1)).float()
        normed = _rms_norm(x, self.feed_forward_norm, self.config.norm_eps).to(self.dtype)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)  # (..., F) each
        return x + self.down(gate * torch.sigmoid(gate) * up).float()


class _Matrix:
    """x (..., in) -> x W^T (..., out) for the rows of several weights together.

    On a CPU the weight lies in the order in which oneDNN's products read it: for 16 texts of 124M parameters a step
    takes three quarters of the time (benchmarks/generation.py). One text in float32 is read by BLAS, which takes four
    fifths of oneDNN's time for a vector.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, texts: int) -> None:
        weight = torch.cat([each.detach() for each in weights]).to(dtype, copy=True)
        is_vector = texts == 1 and dtype == torch.float32
        self._packs = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and not is_vector
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_TEXTS) if self._packs else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packs:
            return x @ self._weight.T
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


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
