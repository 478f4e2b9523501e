"""Checks of the settings of jobs/pretrain.py that need nothing but the settings: the recipe and the loop around it."""

from __future__ import annotations

from typing import Any

from pipeline.config.settings import require
from pipeline.config.tasks import check_tasks


def check_loop(config: Any) -> None:
    """What is due when, how often something may fail, what it costs."""
    check_tasks(config)
    require(config.resize_seconds > 0, f"resize_seconds is {config.resize_seconds:g}; it must be positive")
    every = config.keep_every
    require(
        every is None or (every > 0 and every % config.checkpoint_every == 0),
        f"keep_every is {every}; it must be a multiple of checkpoint_every {config.checkpoint_every}",
    )
    for name in ("price_per_hour", "val_every", "skip_nonfinite"):
        value = getattr(config, name)
        require(value is None or value >= 0, f"{name} is {value}; it must not be negative")
    failures = config.max_failures
    require(failures >= -1, f"max_failures is {failures}; it must not be below -1, which stands for any number")


def check_recipe(config: Any) -> None:
    """Rates, decays, starting weights, the optimizers' constants."""
    _check_rates(config)
    for name in ("embedding_weight_decay", "weight_decay", "embedding_init_std", "init_std"):
        value = getattr(config, name)
        require(value in {None, "fan_in"} or value >= 0, f"{name} is {value}; it must not be negative")
    clip = config.grad_clip
    require(clip >= 0, f"grad_clip is {clip}; it must be positive, or 0, with which gradients are never scaled")
    for name in ("beta1", "beta2", "muon_momentum"):
        value = getattr(config, name)
        require(0 <= value < 1, f"{name} is {value}; it must lie in [0, 1)")
    require(config.eps > 0, f"eps is {config.eps}; it must be positive, or weights without a gradient become nan")
    coefficients = config.muon_coefficients
    reached = sum(coefficients)
    require(
        0.5 <= reached <= 1.5,
        f"muon_coefficients {' '.join(f'{each:g}' for each in coefficients)} turn 1 into {reached:g}, which must "
        "lie between 0.5 and 1.5; two that fit are 3.4445 -4.775 2.0315 and 2 -1.5 0.5",
    )


def _check_rates(config: Any) -> None:
    if config.tie_embeddings:
        for name, given in (("output_lr", config.output_lr), ("zero_init_output", config.zero_init_output or None)):
            require(
                given is None,
                f"{name} is {given}, but the output matrix is the embedding; leave it out, or give --no_tie_embeddings",
            )
    require(config.lr >= 0, f"lr is {config.lr}; it must not be negative")
    for name in ("embedding_lr", "output_lr", "vector_lr"):
        value = getattr(config, name)
        require(value is None or value >= 0, f"{name} is {value}; it must not be negative")
        require(
            value is None or config.lr > 0, f"{name} is {value} and lr is {config.lr}; with it, lr must be positive"
        )
