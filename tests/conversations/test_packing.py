"""Windows of packed conversations: as a plain search for the best fit makes them, and what their flags say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pipeline.conversations.packing import fill, pack
from pipeline.conversations.templates import EncodedConversation
from pipeline.dataset.packed import documents_of, num_learned, targets_of


def plain_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, looking at every window for every conversation."""
    windows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        fitting = [window for window in range(len(windows)) if left[window] >= lengths[number]]
        if not fitting:
            windows.append([])
            left.append(capacity)
            fitting = [len(windows) - 1]
        least = min(left[window] for window in fitting)
        best = [window for window in fitting if left[window] == least]
        windows[best[-1]].append(number)
        left[best[-1]] -= lengths[number]
    return windows


@pytest.mark.parametrize("capacity", [1, 7, 65, 1025])
def test_windows_are_those_of_a_plain_search(capacity: int) -> None:
    choose = random.Random(capacity)
    lengths = [choose.randint(1, capacity) for _ in range(500)]
    windows = pack(lengths, capacity)
    assert sorted(number for window in windows for number in window) == list(range(500))
    assert all(0 < sum(lengths[number] for number in window) <= capacity for window in windows)
    plain = plain_pack(lengths, capacity)
    spaces = [sorted(sum(lengths[number] for number in window) for window in each) for each in (windows, plain)]
    assert spaces[0] == spaces[1]  # windows with as much left are taken in any order


def test_no_conversations_make_no_windows() -> None:
    ids, flags = fill([], capacity=9, filling_id=5, dtype=np.dtype(np.uint16))
    assert (len(ids), len(flags), ids.dtype) == (0, 0, np.uint16)


def test_a_window_and_what_a_step_makes_of_it() -> None:
    first = EncodedConversation(ids=np.array([1, 2, 3, 4]), learned=np.array([False, False, True, True]))
    second = EncodedConversation(ids=np.array([7, 8, 9]), learned=np.array([False, True, False]))
    ids, flags = fill([second, first], capacity=9, filling_id=0, dtype=np.dtype(np.uint16))
    assert ids.tolist() == [1, 2, 3, 4, 7, 8, 9, 0, 0]
    assert flags.tolist() == [2, 0, 1, 1, 2, 1, 0, 0, 0]
    assert num_learned(flags) == 3
    window, marks = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(flags.astype(np.int64))[None]
    assert targets_of(window[:, 1:], marks).tolist() == [[-1, 3, 4, -1, 8, -1, -1, -1]]
    assert documents_of(marks[:, :-1]).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]
