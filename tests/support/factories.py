"""Settings of tests."""

from __future__ import annotations

from typing import Any

from pipeline.config.training import PretrainConfig


def tiny_config(**changes: Any) -> PretrainConfig:
    """A run on the CPU of a network that takes milliseconds a step; ``changes`` are fields of PretrainConfig."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 2,
        "d_model": 32,
        "d_ff": 64,
        "context_length": 32,
        "tokens_per_step": 32 * 16,
        "batch_size": 2,
        "train_steps": 12,
        "log_every": 1,
        "val_tokens": 200,
        "sample_tokens": 8,
        "num_workers": 1,
        "device": "cpu",
    }
    return PretrainConfig(**(settings | changes))
