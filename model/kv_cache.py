"""Keys and values of the tokens that a network has seen, so that each new token costs one position."""

from __future__ import annotations

from model.config import ModelConfig
from model.layers import LayerCache


class KVCache:
    """Keys and values of the tokens seen so far, one LayerCache per block, up to context_length positions."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = [LayerCache(config.context_length) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all positions and keep the memory."""
        for layer in self.layers:
            layer.length = 0
