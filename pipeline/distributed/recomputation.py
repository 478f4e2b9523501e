"""Activation checkpointing: what a block computes is forgotten and computed again where the backward pass needs it.

A block then keeps its input only, (B, T, D), for one more forward pass of the blocks (arXiv 1604.06174). The same
operations run on the same numbers, so loss and gradients keep their bits; nothing in a block draws random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer


def recompute_blocks(model: Transformer) -> None:
    """Make every block of ``model`` compute its insides again in backward, in place; weights keep their names.

    Call it before the model is compiled or sharded: a compiler then sees the recomputation, and a sharded block's
    weights are there when it happens.
    """
    for block in model.blocks:
        block.forward = functools.partial(_forward, block.forward)


def _forward(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():  # validation and generation keep nothing anyway
        return forward(*args)
    result: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    return result
