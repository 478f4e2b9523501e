"""The shape of the network, and the counts that follow from the shape alone.

Nothing here touches a tensor: jobs and the memory and speed figures use the same numbers before any weight exists.
The GPT-2.5 recipe (vocabulary 50,257, context 1,024, 12 layers, 12 heads, width 768, feed-forward 2,048, tied) has
exactly 123,551,232 parameters.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

VOCAB_MULTIPLE = 64
"""Embedding rows come in multiples of this: matrix products of odd width miss the fast tensor-core tiles."""

INIT_STD = 0.02
"""Standard deviation of every matrix at the start, as in GPT-2."""
FAN_IN_GAIN = 3**-0.5
"""Times 1/sqrt(columns): the standard deviation of a uniform draw from +-1/sqrt(columns), torch's own for a Linear."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of a decoder-only transformer; raises ValueError with the offending values where they do not fit."""

    vocab_size: int
    """Token ids that exist; the padding rows behind them are no ids."""
    context_length: int
    """Tokens that the model sees at once."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads per block, each d_model / num_heads wide."""
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Width of the SwiGLU layer."""
    theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output projection too."""
    qk_norm: bool = False
    """Norm each head's query and key, each with weights of its own, before their rotation: Qwen3's network."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
        for name in ("theta", "norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        self._check_heads()

    def _check_heads(self) -> None:
        width, heads = self.d_model, self.num_heads
        if width % heads:
            below, above = width // heads * heads, (width // heads + 1) * heads
            nearest = f"{below} and {above}" if below else f"{above}"
            raise ValueError(
                f"d_model {width} is not divisible by num_heads {heads}; the nearest d_model that is: {nearest}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"d_model {width} / num_heads {heads} gives heads of odd width {self.head_dim}; rotary positions turn "
                f"pairs, so d_model must be a multiple of {2 * heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width K of one attention head."""
        return self.d_model // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output projection: vocab_size rounded up to a multiple of 64."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the network; padding rows are left out, a tied matrix is counted once."""
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        norms = (2 * self.num_layers + 1) * self.d_model + (2 * self.num_layers * self.head_dim if self.qk_norm else 0)
        return embeddings + self.num_layers * self._matrix_parameters_per_block + norms

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters of matrix products: the blocks' matrices and the output projection over real ids."""
        return self.num_layers * self._matrix_parameters_per_block + self.vocab_size * self.d_model

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Floating-point operations of one training token, forward and backward: the numerator of MFU.

        6 N + 12 L D T, the convention of PaLM's appendix B (arXiv 2204.02311): N counts the parameters of matrix
        products (num_matrix_parameters; looking up an embedding costs none),
        each with 2 operations forward and 4 backward; attention's two products over T keys are counted in full, NOT
        halved for the causal mask. Recomputation and padding columns are not counted.

        Args:
            context_length: T, the tokens of one window; not given: the config's.
        """
        length = self.context_length if context_length is None else context_length
        return 6 * self.num_matrix_parameters + 12 * self.num_layers * self.d_model * length

    @property
    def _matrix_parameters_per_block(self) -> int:
        return 4 * self.d_model**2 + 3 * self.d_model * self.d_ff

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values: ModelConfig(**config.to_dict()) == config."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Init:
    """How the weights are drawn; the defaults are GPT-2's."""

    std: float | None = INIT_STD
    """Of the blocks' matrices and of an output matrix of its own; None: 0.577 / sqrt(columns) of each."""
    embedding_std: float = INIT_STD
    zero_projections: bool = False
    """Projections back into the residual stream start at zero: each block begins as the identity."""
    zero_output: bool = False
    """An output matrix of its own starts at zero: the first loss is ln(vocab_size)."""
