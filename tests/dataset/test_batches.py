"""The data order: every window once an epoch, the same order for any number of workers, O(1) at any step."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import batches
from pipeline.dataset.batches import BatchOrder, micro_batches, permute
from pipeline.dataset.shards import TokenStream
from pipeline.errors import UserError

FIFTEEN_TRILLION = 15 * 10**12

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**32 - 1)


@given(size=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutations_look_random() -> None:
    size = 10_000
    image = permute(np.arange(size), size=size, seed=1, epoch=0)
    other_epoch = permute(np.arange(size), size=size, seed=1, epoch=1)
    other_seed = permute(np.arange(size), size=size, seed=2, epoch=0)
    # For a random permutation correlations are normal with deviation 1/sqrt(size) = 0.01, fixed points Poisson(1).
    for values in (image, other_epoch, other_seed):
        assert abs(np.corrcoef(np.arange(size), values)[0, 1]) < 0.05
        assert (values == np.arange(size)).sum() < 10
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert (image == other_epoch).mean() < 0.01
    assert (image == other_seed).mean() < 0.01


@given(
    num_windows=st.integers(1, 500),
    windows_per_step=st.integers(1, 64),
    batch_size=st.integers(1, 16),
    seed=seeds,
    world_sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6),
)
@settings(max_examples=50)
def test_each_window_once_an_epoch_for_any_number_of_ranks_that_changes_at_any_step(
    num_windows: int, windows_per_step: int, batch_size: int, seed: int, world_sizes: list[int]
) -> None:
    order = BatchOrder(num_windows=num_windows, windows_per_step=windows_per_step, batch_size=batch_size, seed=seed)
    steps = -(-2 * num_windows // windows_per_step)  # two epochs and a bit
    alone = np.concatenate([order.step_windows(step) for step in range(steps)])
    together = np.concatenate(
        [
            window
            for step, world_size in zip(range(steps), itertools.cycle(world_sizes), strict=False)
            for rank in range(world_size)
            for window in order.micro_batch_windows(step, rank, world_size)
        ]
    )
    assert np.array_equal(alone, together)
    assert np.array_equal(np.sort(alone[:num_windows]), np.arange(num_windows))
    assert np.array_equal(np.sort(alone[num_windows : 2 * num_windows]), np.arange(num_windows))


@given(windows_per_step=st.integers(1, 100), batch_size=st.integers(1, 16), world_size=st.integers(1, 8))
def test_ranks_run_the_same_number_of_micro_batches_of_bounded_size(
    windows_per_step: int, batch_size: int, world_size: int
) -> None:
    order = BatchOrder(num_windows=1000, windows_per_step=windows_per_step, batch_size=batch_size, seed=0)
    counts = set()
    for rank in range(world_size):
        groups = order.micro_batch_windows(3, rank, world_size)
        counts.add(len(groups))
        assert max(len(group) for group in groups) <= batch_size
    assert counts == {order.num_micro_batches(world_size)}


def test_any_step_of_fifteen_trillion_tokens_is_at_hand() -> None:
    num_windows = FIFTEEN_TRILLION // 1025
    order = BatchOrder(num_windows=num_windows, windows_per_step=512, batch_size=32, seed=7)
    last_step = num_windows // 512 - 1
    windows = order.step_windows(last_step)
    assert len(np.unique(windows)) == 512
    assert windows.min() >= 0 and windows.max() < num_windows
    assert np.array_equal(windows[128:256], order.step_windows(last_step, rank=1, world_size=4))


@given(
    num_windows=st.integers(1, FIFTEEN_TRILLION // 1025),
    share=st.floats(0, 3),
    seed=seeds,
    rank=st.integers(0, 3),
)
@settings(max_examples=50)
def test_a_step_costs_the_same_wherever_it_lies(num_windows: int, share: float, seed: int, rank: int) -> None:
    """Counted in values sent through the network's rounds and in bytes, for up to 15 trillion tokens, three epochs."""
    order = BatchOrder(num_windows=num_windows, windows_per_step=2048, batch_size=32, seed=seed)
    values: list[int] = []

    def counting(numbers: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
        values.append(len(numbers))
        return feistel(numbers, half_bits, keys)

    feistel = batches._feistel
    step, peaks = int(share * num_windows / 2048), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_feistel", counting)
        windows = order.step_windows(step, rank, 4)
    for _ in range(3):  # the peak counts what other threads of this process take meanwhile
        tracemalloc.start()
        order.step_windows(step, rank, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(windows) == 512
    # At least a quarter of the domain is inside, so a window takes four walks at most on average: 2048, deviation 80.
    assert sum(values) < 2 * 4 * 512
    assert min(peaks) < 64 * 8 * 512


def stream_of(num_tokens: int) -> TokenStream:
    half = num_tokens // 3
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return TokenStream([tokens[:half], tokens[half:]], vocab_size=65536)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_weighted_losses_average_to_the_mean_over_the_step(world_size: int) -> None:
    stream, length = stream_of(2000), 9
    order = BatchOrder(num_windows=len(stream) // (length + 1), windows_per_step=7, batch_size=2, seed=3)
    expected = torch.tensor([stream.read(int(w) * 10, 10)[:-1].mean() for w in order.step_windows(4)]).double().mean()
    total = 0.0
    for rank in range(world_size):
        batches = micro_batches(
            stream, order, context_length=length, step=4, rank=rank, world_size=world_size, device=torch.device("cpu")
        )
        for batch in batches:
            assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])
            total += batch.inputs.double().mean().item() * batch.weight / world_size
    assert total == pytest.approx(expected.item(), rel=1e-6)


def test_data_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(UserError, match="shorter than one window"):
        BatchOrder(num_windows=0, windows_per_step=1, batch_size=1, seed=0)
