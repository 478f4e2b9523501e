"""The network: embedding, pre-norm blocks, norm, output projection; Llama's architecture at GPT-2's size.

The vocabulary is padded inside to a multiple of 64; what goes in and comes out knows real ids only: the padding rows
stay zero, win no sample and get no gradient. An untrained model's loss is close to ln(vocab_size), 10.8 for 50,257.

Shapes: B batch, T time, D model, V vocab, P padded vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import FAN_IN_GAIN, Init, ModelConfig
from model.document_attention import block_mask, positions_in, takes_flex
from model.kv_cache import KVCache
from model.layers import (
    CausalSelfAttention,
    Embedding,
    LayerCache,
    Linear,
    Mask,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SwiGLU,
    document_mask,
)
from model.loss import LinearCrossEntropy


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, rotation: Rotation | None = None, mask: Mask | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, rotation, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """Tokens to logits, or to the mean loss. Weights are zero until init_weights or a loader fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.theta)
        self.output = None if config.tie_embeddings else Linear(config.d_model, config.padded_vocab_size)
        self.loss = LinearCrossEntropy(config.vocab_size)
        self.compute_dtype: torch.dtype | None = None
        """Type of the residual stream and of the matrix products; None: that of the embedding."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        *,
        all_count: bool = False,
    ) -> Tensor:
        """Logits of the next token at each position, or their mean loss against the targets.

        Args:
            tokens: (B, T) int64 in [0, vocab_size), T at most context_length, what the cache holds counted in.
            targets: (B, T) int64 in [0, vocab_size); the token that follows each. With documents, -1 stands for a
                target that does not count: it adds zero to the sum, which is divided by B T all the same.
            cache: keys and values of the tokens before these; is extended by these.
            documents: (B, T) integers that never fall along T: which of several documents packed into a row a token
                belongs to. A token sees those of its own document only, and positions begin at 0 in each. It goes
                without a cache.
            all_count: whether with documents every target counts, none being -1: on a GPU it spares the logits'
                gradient a pass.

        Returns:
            Logits (B, T, V) in the weights' dtype; with targets the mean loss in nats, 0-d float32.
        """
        self._check_length(tokens, cache)
        if targets is not None:
            return self.mean_loss(tokens, targets, cache, documents, all_count=all_count)
        x = self._hidden(tokens, cache, documents)  # (B, T, D)
        return (x @ self._output_weight().to(x.dtype).T)[..., : self.config.vocab_size]  # (B, T, P) -> (B, T, V)

    def mean_loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        *,
        all_count: bool = False,
    ) -> Tensor:
        """From tokens to the loss: all that a training step computes forward, in one piece that can be compiled."""
        hidden = self._hidden(tokens, cache, documents)
        return self.loss(hidden, self._output_weight(), targets, ignores=documents is not None and not all_count)

    def _hidden(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Tensor:
        x = self.embedding(tokens)  # (B, T, D)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        start = 0 if cache is None else cache.length
        rotation = self.rotary.angles(start, tokens.shape[1], tokens.device)  # once, not once a layer
        mask: Mask | None = None
        if documents is not None:
            mask = block_mask(documents) if takes_flex(tokens.device) else document_mask(documents)
            rotation = rotation.at(positions_in(documents))
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[index], rotation, mask)
        return self.norm(x)

    def _output_weight(self) -> Tensor:
        # Used in the forward of the module that a sharding wrapper treats as the root: its weights and the embedding's
        # are gathered together, and are there for the whole of that call.
        return self.embedding.weight if self.output is None else self.output.weight

    def _check_length(self, tokens: Tensor, cache: KVCache | None) -> None:
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens exceed the model's context_length {self.config.context_length}")


@torch.no_grad()
def init_weights(model: Transformer, seed: int, init: Init | None = None) -> None:
    """Fills the weights: matrices normal with std 0.02, or as ``init`` says, norms one, padding rows zero.

    Projections back into the residual stream (o_proj, down_proj) get 1 / sqrt(2 num_layers) of that, so that the
    stream's variance does not grow with depth (GPT-2, section 2.3). Drawn on the CPU: same seed, same weights on any
    device; what starts at zero is drawn too, so that all else is the same with it and without.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        values = torch.randn(parameter.shape, generator=generator) * _std(name, parameter, model.config, init or Init())
        if name in ("embedding.weight", "output.weight"):
            values[model.config.vocab_size :] = 0
        parameter.copy_(values)


def _std(name: str, parameter: Tensor, config: ModelConfig, init: Init) -> float:
    if name == "embedding.weight":
        return init.embedding_std
    std = FAN_IN_GAIN / parameter.shape[1] ** 0.5 if init.std is None else init.std
    if name == "output.weight":
        return 0.0 if init.zero_output else std
    if not name.endswith(("o_proj.weight", "down_proj.weight")):
        return std
    return 0.0 if init.zero_projections else std / (2 * config.num_layers) ** 0.5
