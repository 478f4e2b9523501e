"""Conversations packed into windows, as many in each as fit: best-fit decreasing.

The longest conversation goes first, each into the fullest window that still has room for it (Johnson, Near-optimal bin
packing algorithms, 1973: at most 11/9 of the windows that are needed, and 6/9 of one). The result is a function of the
conversations and their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.conversations.templates import EncodedConversation
from pipeline.dataset.packed import BEGINS, LEARNED


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Windows as the numbers of the conversations in them; every length is at most ``capacity``, and positive."""
    windows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # windows with so many tokens left
    spaces = 0  # bit s is set where by_space[s] has a window
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if large_enough := spaces >> length:
            space = length + (large_enough & -large_enough).bit_length() - 1
            window = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, window = capacity, len(windows)
            windows.append([])
        windows[window].append(number)
        by_space[space - length].append(window)
        spaces |= 1 << (space - length)
    return windows


def fill(
    conversations: Sequence[EncodedConversation], *, capacity: int, filling_id: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids and flags (dataset/packed.py) of the windows end to end, (windows * capacity,) each, of type ``dtype``."""
    windows = pack([len(each.ids) for each in conversations], capacity)
    ids = np.full((len(windows), capacity), filling_id, dtype)
    flags = np.zeros((len(windows), capacity), dtype)
    for row, numbers in enumerate(windows):
        start = 0
        for number in numbers:
            each = conversations[number]
            stop = start + len(each.ids)
            ids[row, start:stop] = each.ids
            flags[row, start:stop] = each.learned * LEARNED
            flags[row, start] = BEGINS
            start = stop
    return ids.ravel(), flags.ravel()
