"""Conversations packed into windows, as many in each as fit (dataset/best_fit.py), with their flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.conversations.templates import EncodedConversation
from pipeline.dataset.best_fit import pack
from pipeline.dataset.packed import BEGINS, LEARNED


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
