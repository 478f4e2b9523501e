"""How many windows each source of a mixture gives to each step: whole numbers that follow the weights.

A step has G windows and source i the share w_i of them, which is no whole number in general. In every step source i
gives w_i x G windows, rounded down or up, and after every step the sum so far is less than one window from w_i x G x
steps. Such a schedule exists for any weights; it is the Pfair schedule of tasks on processors, found by the algorithm
PF (Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress: A Notion of Fairness in Resource Allocation",
Algorithmica 15, 1996). It repeats after the number of steps that make all w_i x G whole, so it is a table, and the
windows before any step are one look into it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


class Proportions:
    """The windows that each of k sources gives to the steps of a phase.

    Args:
        parts: weights of the sources as whole numbers, 0 for one that gives none. Their sum bounds the table's length.
        windows_per_step: G, windows of one step.
    """

    def __init__(self, parts: Sequence[int], windows_per_step: int) -> None:
        self._cycle = _cycle(tuple(parts), windows_per_step)

    def before(self, step: int) -> Counts:
        """Windows of each source in the phase's steps [0, step), (k,) int64; O(1)."""
        cycles, rest = divmod(step, len(self._cycle) - 1)
        before: Counts = cycles * self._cycle[-1] + self._cycle[rest]
        return before


@functools.lru_cache(32)
def _cycle(parts: tuple[int, ...], windows_per_step: int) -> Counts:
    """Windows of each source in steps [0, s) for every s up to the end of the cycle: (steps + 1, k) int64."""
    total = sum(parts)
    steps = math.lcm(*(Fraction(part * windows_per_step, total).denominator for part in parts))
    whole = [part * windows_per_step // total for part in parts]
    rest = [part * windows_per_step % total * steps // total for part in parts]  # windows more in the whole cycle
    given = np.tile(np.array(whole, dtype=np.int64), (steps, 1))
    given[:, np.flatnonzero(rest)] += _fair_schedule([share for share in rest if share], steps)
    return np.concatenate([np.zeros((1, len(parts)), dtype=np.int64), np.cumsum(given, axis=0)])


def _fair_schedule(shares: Sequence[int], steps: int) -> Counts:
    """PF: 0 or 1 for each step and task, (steps, tasks); task i has ``shares[i]`` of the ``steps``, 0 < share < steps.

    After t steps a task has had t x share / steps of them, rounded down or up. Every step has sum(shares) / steps
    tasks: those that would fall behind by a whole one without it, and of those that need not have it nor may not, the
    ones with the most pressing future, which is what the signs of _futures say.
    """
    futures = [_future(share, steps) for share in shares]
    per_step = sum(shares) // steps
    schedule = np.zeros((steps, len(shares)), dtype=np.int64)
    done = [0] * len(shares)
    for step in range(steps):
        chosen, waiting = [], []
        for task, share in enumerate(shares):
            lag = step * share - done[task] * steps
            sign = futures[task][0][step]
            if lag > 0 and sign != _FREE:
                chosen.append(task)
            elif lag >= 0 or sign == _OVERDUE:
                waiting.append(task)
        if (wanted := per_step - len(chosen)) > 0:
            pressing = [(futures[task][0][step + 1 : futures[task][1][step]], -task) for task in waiting]
            chosen += [-task for _, task in sorted(pressing, reverse=True)[:wanted]]
        for task in chosen:
            schedule[step, task] = 1
            done[task] += 1
    return schedule


_FREE, _EVEN, _OVERDUE = range(3)


def _future(share: int, steps: int) -> tuple[bytes, list[int]]:
    """A task's sign in each step of two cycles, and for each step the end of its signs up to the next even one.

    The sign is that of (t + 1) x share / steps - floor(t x share / steps) - 1: whether the whole part grows in step t
    and something is left (overdue), nothing is left (even), or it does not grow (free).
    """
    times = np.arange(2 * steps, dtype=np.int64)
    signs = np.sign((times + 1) * share - (times * share // steps + 1) * steps) + 1
    even = np.flatnonzero(signs == _EVEN)
    ends = even[np.minimum(np.searchsorted(even, times[:steps], side="right"), len(even) - 1)] + 1
    return signs.astype(np.uint8).tobytes(), ends.tolist()
