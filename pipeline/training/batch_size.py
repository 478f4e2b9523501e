"""Possible sizes of micro-batches, and the messages if one of them, or the network itself, does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from model.config import ModelConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError

_MESSAGES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


def possible_sizes(windows: int) -> list[int]:
    """Possible sizes of micro-batches for ``windows`` windows per worker, ascending.

    They are the divisors, for which only one shape is compiled, and the results of repeated halving, rounded up, so
    that each size is at most twice the one before.
    """
    sizes = {size for size in range(1, windows + 1) if windows % size == 0}
    while windows > 1:
        windows = (windows + 1) // 2
        sizes.add(windows)
    return sorted(sizes)


def windows_per_worker(config: PretrainConfig, world_size: int) -> int:
    """Largest number of windows that one worker has per step."""
    return -(-config.windows_per_step // world_size)


def micro_batch_windows(config: PretrainConfig, world_size: int) -> int:
    """Windows in the largest micro-batch: batch_size or fewer, as the windows are distributed evenly."""
    windows = windows_per_worker(config, world_size)
    return -(-windows // -(-windows // config.micro_batch))


def next_smaller(config: PretrainConfig, world_size: int) -> int | None:
    """The largest batch_size with smaller micro-batches than now; None if they have one window."""
    now = micro_batch_windows(config, world_size)
    return max((size for size in possible_sizes(windows_per_worker(config, world_size)) if size < now), default=None)


def out_of_memory_explained(config: PretrainConfig, world_size: int) -> contextlib.AbstractContextManager[None]:
    """A context in which running out of memory raises a UserError that names settings which need less.

    Only this rank raises it: after a failed allocation in a backward pass it cannot take part in the collectives that
    the others wait in.
    """
    return _explained(lambda: _sentence(config, world_size))


def building_explained(model: ModelConfig, world_size: int) -> contextlib.AbstractContextManager[None]:
    """The same while weights and moments are made: no size of micro-batches changes what these need."""
    return _explained(
        lambda: (
            f"the device's memory does not hold the network of {model.num_parameters:,} parameters and the optimizer's "
            f"moments, divided among {world_size} workers; give a smaller model or more workers"
        )
    )


@contextlib.contextmanager
def _explained(sentence: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)):
            raise
        raise UserError(sentence()) from error


def _sentence(config: PretrainConfig, world_size: int) -> str:
    windows, smaller = micro_batch_windows(config, world_size), next_smaller(config, world_size)
    ways = [] if smaller is None else [f"--batch_size {smaller}"]
    if config.recompute == "none":
        ways.append("--recompute blocks, which keeps far less for the backward pass")
    if smaller is None:
        ways.append("a smaller model, a shorter context_length or more workers")
    return (
        f"the device's memory does not hold a micro-batch of {windows} windows of {config.context_length:,} tokens; "
        f"give {', or '.join(ways)}; the same command with it goes on from the newest checkpoint"
    )
