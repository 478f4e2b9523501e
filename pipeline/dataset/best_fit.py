"""Best-fit decreasing: things of given lengths packed into windows, as many in each as fit.

The longest goes first, each into the fullest window that still has room for it (Johnson, Near-optimal bin packing
algorithms, 1973: at most 11/9 of the windows that are needed, and 6/9 of one). The result is a function of the lengths
and their order.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Spaces:
    """Windows by the number of tokens left in them."""

    def __init__(self, capacity: int) -> None:
        self._windows: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._bits = 0  # bit s is set where a window has s tokens left

    def put(self, window: int, space: int) -> None:
        self._windows[space].append(window)
        self._bits |= 1 << space

    def smallest(self, length: int) -> int | None:
        """The smallest space of at least ``length`` tokens."""
        large_enough = self._bits >> length
        return length + (large_enough & -large_enough).bit_length() - 1 if large_enough else None

    def take(self, space: int) -> int:
        """The window that got this space last."""
        windows = self._windows[space]
        window = windows.pop()
        if not windows:
            self._bits &= ~(1 << space)
        return window


def pack(lengths: Sequence[int], capacity: int, is_rest: Sequence[bool] | None = None) -> list[list[int]]:
    """Windows as the numbers of the things in them; every length is at most ``capacity``, and positive.

    Args:
        is_rest: whether a thing can only stand at the head of a window, so that no window gets two of these, and
            whatever it gets stands behind. Not given, none is.
    """
    windows: list[list[int]] = []
    headed, others = _Spaces(capacity), _Spaces(capacity)  # those with a rest at their head, and those without
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length, rest = lengths[number], is_rest is not None and is_rest[number]
        in_headed, in_others = None if rest else headed.smallest(length), others.smallest(length)
        if in_headed is not None and (in_others is None or in_headed <= in_others):
            space, window = in_headed, headed.take(in_headed)
            becomes_headed = True
        elif in_others is not None:
            space, window = in_others, others.take(in_others)
            becomes_headed = rest
        else:
            space, window = capacity, len(windows)
            windows.append([])
            becomes_headed = rest
        windows[window].insert(0 if rest else len(windows[window]), number)
        (headed if becomes_headed else others).put(window, space - length)
    return windows
