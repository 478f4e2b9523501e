"""Activation checkpointing: the activations of a block are dropped and computed again for the backward pass.

A block then keeps its input only, (B, T, D), and costs one more forward pass (arXiv 1604.06174). The same
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
    """Make every block of ``model`` recompute its activations in backward, in place; weights keep their names.

    Call it before the model is compiled or sharded: the compiler then sees the recomputation, and FSDP has gathered
    the weights of the block when it happens.
    """
    for block in model.blocks:
        block.forward = functools.partial(_forward, block.forward)


def _forward(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():  # validation and generation keep no activations
        return forward(*args)
    result: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    return result
