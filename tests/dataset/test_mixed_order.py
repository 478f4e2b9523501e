"""The order of a mixture: shares within one window, each window once an epoch of its source, O(1), any workers."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import batches
from pipeline.dataset.batches import BatchOrder, permute
from pipeline.dataset.mixed_order import MixedOrder, MixedStream, Phases
from pipeline.dataset.proportions import Proportions
from pipeline.dataset.shards import TokenStream

FIFTEEN_TRILLION = 15 * 10**12
FIXED = settings(max_examples=60, derandomize=True)

weights = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any).map(tuple)


def naive_counts(parts: tuple[int, ...], windows_per_step: int, num_steps: int) -> list[list[int]]:
    """Windows of each source in each step, by PF as its paper has it: fractions, step after step, sign after sign."""
    quotas = [Fraction(part * windows_per_step, sum(parts)) for part in parts]
    rates = [quota - math.floor(quota) for quota in quotas]
    given = [0] * len(parts)
    steps = []

    def sign(rate: Fraction, step: int) -> int:
        difference = rate * (step + 1) - math.floor(rate * step) - 1
        return (difference > 0) - (difference < 0)

    def future(rate: Fraction, step: int) -> list[int]:
        signs = []
        for later in itertools.count(step + 1):
            signs.append(sign(rate, later))
            if signs[-1] == 0:
                return signs
        raise AssertionError

    for step in range(num_steps):
        urgent: list[int] = []
        contending: list[int] = []
        for source, rate in enumerate(rates):
            lag = rate * step - given[source]
            if rate == 0 or (lag < 0 and sign(rate, step) <= 0):
                continue
            (urgent if lag > 0 and sign(rate, step) >= 0 else contending).append(source)
        contending.sort(key=lambda source: (future(rates[source], step), -source), reverse=True)
        left = int(sum(rates)) - len(urgent)
        extra = {*urgent, *contending[:left]}
        given = [count + (source in extra) for source, count in enumerate(given)]
        steps.append([math.floor(quota) + (source in extra) for source, quota in enumerate(quotas)])
    return steps


@given(parts=weights, windows_per_step=st.integers(1, 70))
@FIXED
def test_shares_are_exact_within_one_window_in_a_step_and_after_it(
    parts: tuple[int, ...], windows_per_step: int
) -> None:
    proportions, total = Proportions(parts, windows_per_step), sum(parts)
    before = np.zeros(len(parts), dtype=np.int64)
    for step in range(2 * total + 1):
        after = proportions.before(step + 1)
        of_step = after - before
        assert of_step.sum() == windows_per_step
        for given_windows, in_step, part in zip(after.tolist(), of_step.tolist(), parts, strict=True):
            quota = Fraction(part * windows_per_step, total)
            assert in_step in (math.floor(quota), math.ceil(quota))
            assert abs(given_windows - (step + 1) * quota) < 1
        before = after


@given(parts=weights, windows_per_step=st.integers(1, 70))
@FIXED
def test_the_table_is_what_the_algorithm_gives_step_by_step(parts: tuple[int, ...], windows_per_step: int) -> None:
    proportions = Proportions(parts, windows_per_step)
    expected = naive_counts(parts, windows_per_step, 40)
    found = [(proportions.before(step + 1) - proportions.before(step)).tolist() for step in range(40)]
    assert found == expected


@st.composite
def orders(draw: st.DrawFn) -> MixedOrder:
    sources = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=4)))
    lengths = draw(st.lists(st.integers(1, 12), max_size=3))
    parts = st.tuples(*[st.integers(0, 9)] * len(sources)).filter(any)
    phases = tuple((first, draw(parts)) for first in [0, *itertools.accumulate(lengths)])
    return MixedOrder(
        num_windows=sum(sources),
        source_windows=sources,
        phases=phases,
        windows_per_step=draw(st.integers(1, 24)),
        batch_size=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def naive_windows(order: MixedOrder, num_steps: int) -> list[list[int]]:
    """The windows of each step: step after step, each source going on where it was."""
    starts = [0, *itertools.accumulate(order.source_windows)]

    def windows_of(source: int) -> Iterator[int]:
        size = order.source_windows[source]
        for epoch in itertools.count():
            keys = {"source": source} if source else {}
            yield from permute(np.arange(size), size=size, seed=order.seed, epoch=epoch, **keys) + starts[source]

    readers = [windows_of(source) for source in range(len(order.source_windows))]
    ends = [first for first, _ in order.phases[1:]] + [num_steps]
    steps = []
    for (first, parts), end in zip(order.phases, ends, strict=True):
        for counts in naive_counts(parts, order.windows_per_step, max(0, min(end, num_steps) - first)):
            steps.append(
                [int(next(reader)) for reader, count in zip(readers, counts, strict=True) for _ in range(count)]
            )
    return steps


@given(order=orders(), world_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@FIXED
def test_any_workers_that_change_at_any_step_read_what_a_loop_over_the_steps_reads(
    order: MixedOrder, world_sizes: list[int]
) -> None:
    num_steps = 40
    expected = naive_windows(order, num_steps)
    for step, world_size in zip(range(num_steps), itertools.cycle(world_sizes), strict=False):
        groups = [order.micro_batch_windows(step, rank, world_size) for rank in range(world_size)]
        assert {len(of_rank) for of_rank in groups} == {order.num_micro_batches(world_size)}
        found = [int(window) for of_rank in groups for group in of_rank for window in group]
        assert found == expected[step]


@given(order=orders())
@FIXED
def test_each_window_once_an_epoch_of_its_source_over_all_phases(order: MixedOrder) -> None:
    read = np.concatenate([order.step_windows(step) for step in range(60)])
    starts = [0, *itertools.accumulate(order.source_windows)]
    for start, size in zip(starts, order.source_windows, strict=False):
        own = read[(read >= start) & (read < start + size)] - start
        whole = len(own) // size * size
        for epoch in own[:whole].reshape(-1, size):
            assert np.array_equal(np.sort(epoch), np.arange(size))
        assert len(np.unique(own[whole:])) == len(own) - whole


@given(size=st.integers(1, 300), windows_per_step=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
@FIXED
def test_a_first_phase_of_one_source_is_the_order_of_that_source_alone(
    size: int, windows_per_step: int, seed: int
) -> None:
    settings_of: dict[str, int] = {"windows_per_step": windows_per_step, "batch_size": 4, "seed": seed}
    alone = BatchOrder(num_windows=size, **settings_of)
    mixed = MixedOrder(
        num_windows=size + 7, source_windows=(size, 7), phases=((0, (1, 0)), (20, (1, 1))), **settings_of
    )
    for step in range(20):
        assert np.array_equal(mixed.step_windows(step, 1, 3), alone.step_windows(step, 1, 3))


def test_sources_of_the_same_size_have_orders_of_their_own() -> None:
    order = MixedOrder(
        num_windows=2000,
        source_windows=(1000, 1000),
        phases=((0, (1, 1)),),
        windows_per_step=2000,
        batch_size=9,
        seed=5,
    )
    first, second = order.step_windows(0)[:1000], order.step_windows(0)[1000:] - 1000
    assert (first == second).sum() < 10, "fixed points of a random permutation are Poisson with mean 1"


LONG: Phases = ((0, (7000, 2000, 999, 1)), (10_000_000, (1, 2, 3, 4)), (25_000_000, (0, 0, 1, 9)))


@given(step=st.integers(0, FIFTEEN_TRILLION // 1025 // 512), rank=st.integers(0, 3))
@FIXED
def test_a_step_costs_the_same_wherever_it_lies_in_fifteen_trillion_tokens(step: int, rank: int) -> None:
    """Counted in values sent through the permutation's rounds and in bytes."""
    sizes = (*(FIFTEEN_TRILLION // 1025 * share // 10 for share in (7, 2, 1)), 1000)
    order = MixedOrder(
        num_windows=sum(sizes), source_windows=sizes, phases=LONG, windows_per_step=512, batch_size=32, seed=7
    )
    order.step_windows(step)
    values: list[int] = []

    def counting(numbers: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
        values.append(len(numbers))
        return feistel(numbers, half_bits, keys)

    feistel, peaks = batches._feistel, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_feistel", counting)
        windows = order.step_windows(step, rank, 4)
    for _ in range(3):  # the peak counts what other threads of this process take meanwhile
        tracemalloc.start()
        order.step_windows(step, rank, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(windows) == 128 and windows.min() >= 0 and windows.max() < sum(sizes)
    assert sum(values) < 4 * 4 * 128  # four walks at most on average, 512 of 128 windows, and room for chance
    assert min(peaks) < 64 * 8 * 512


def test_tokens_of_a_mixture_are_those_of_its_sources() -> None:
    """Each source is cut off behind its last whole window, so that no window holds tokens of two."""
    lengths, window = (53, 31, 90), 10
    tokens = [
        np.arange(1000 * number, 1000 * number + length, dtype=np.uint16) for number, length in enumerate(lengths)
    ]
    streams = [TokenStream([part[:20], part[20:]], vocab_size=65536) for part in tokens]
    mixed = MixedStream(streams, window_length=window)
    assert mixed.source_windows == (5, 3, 9) and len(mixed) == 170
    expected = [part[place : place + window] for part in tokens for place in range(0, len(part) - window + 1, window)]
    found = [mixed.read(number * window, window) for number in range(17)]
    assert np.array_equal(found, expected)
    assert mixed.shard_at(75) == ("shard 1", 5), "token 25 of the second source"
    assert [mixed.shard_at(place) for place in (49, 50, 80)] == [("shard 1", 29), ("shard 0", 0), ("shard 0", 0)]
    for start, length in ((45, 10), (165, 10), (170, 1), (-1, 2)):
        with pytest.raises(IndexError):
            mixed.read(start, length)
