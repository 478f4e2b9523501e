"""Attention within documents for compiled CUDA code: flex attention, whose kernel leaves out what no document holds.

A token sees itself and what comes before it in its own document. The kernel (Dong et al., arXiv 2412.05496) goes over
blocks of 128 x 128 positions, of which most lie between two documents; the mask is the list of the others, made once a
forward pass for all layers, and nothing of size (B, T, T) is stored. Uncompiled code, and a CPU, take torch's usual
attention with layers.document_mask in its place, which is the same up to rounding.

Shapes: B batch, T time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLEX_DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices where compiled code takes flex attention; on a CPU it has no gradient (torch 2.13)."""


def takes_flex(device: torch.device) -> bool:
    """Whether attention within documents is flex attention here: uncompiled, it would store all scores."""
    return torch.compiler.is_compiling() and device.type in FLEX_DEVICES


def block_mask(documents: Tensor) -> BlockMask:
    """The blocks of positions in which any query sees a key, for documents (B, T)."""
    rows, length = documents.shape

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    return create_block_mask(sees, rows, None, length, length, device=documents.device)


def positions_in(documents: Tensor) -> Tensor:
    """(B, T) int64: the positions counted from 0 in each document, for documents (B, T) that never fall along T."""
    return torch.arange(documents.shape[1], device=documents.device) - torch.searchsorted(documents, documents)
