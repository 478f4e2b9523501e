"""Conversations packed into windows: what their flags say of the tokens, and what a training step makes of it.

Several conversations lie end to end in a window of context_length + 1 tokens; what is left behind the last one is
filled up. A shard of flags has a number for every token of a shard of tokens:

    LEARNED  1   the token is one that the model learns to say: the loss counts it as a target
    BEGINS   2   the first token of a conversation, which is never a learned one

A window begins with a conversation. What fills it up has no flag and goes on behind the last conversation: nothing
that is learned comes after it.

Shapes: B windows, L = T + 1 tokens of a window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

LEARNED, BEGINS = 1, 2
NOT_COUNTED = -1
"""Stands for a target that the loss does not count."""


def targets_of(next_tokens: Tensor, flags: Tensor) -> Tensor:
    """(B, T) the tokens 1 .. T of windows where they are learned, elsewhere NOT_COUNTED; flags (B, L) of all tokens."""
    return next_tokens.masked_fill((flags[:, 1:] & LEARNED) == 0, NOT_COUNTED)


def documents_of(flags: Tensor) -> Tensor:
    """(B, T) int64, which conversation of its window each token belongs to, counted from 1; flags (B, T)."""
    return ((flags & BEGINS) != 0).long().cumsum(dim=1)


def num_learned(flags: npt.NDArray[Any]) -> int:
    """Targets that the loss counts in windows with these flags."""
    return int(np.count_nonzero(flags & LEARNED))
