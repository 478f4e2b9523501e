"""How many windows a micro-batch may have, and what is said where they do not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError

_SIGNS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


def possible_sizes(windows: int) -> list[int]:
    """Sizes that micro-batches of ``windows`` windows may have, rising.

    Those that divide the windows evenly, so that only one shape is compiled; and what is left by halving again and
    again, rounded up, so that there is always one at most twice as large as the one before.
    """
    sizes = {size for size in range(1, windows + 1) if windows % size == 0}
    while windows > 1:
        windows = (windows + 1) // 2
        sizes.add(windows)
    return sorted(sizes)


def windows_per_worker(config: PretrainConfig, world_size: int) -> int:
    """Windows of a step on the worker that has most."""
    return -(-config.windows_per_step // world_size)


def micro_batch_windows(config: PretrainConfig, world_size: int) -> int:
    """Windows of the largest micro-batch: batch_size, or fewer, as a step's windows are spread evenly."""
    windows = windows_per_worker(config, world_size)
    return -(-windows // -(-windows // config.micro_batch))


def next_smaller(config: PretrainConfig, world_size: int) -> int | None:
    """The largest batch_size that makes micro-batches smaller than now; None where they have one window."""
    now = micro_batch_windows(config, world_size)
    return max((size for size in possible_sizes(windows_per_worker(config, world_size)) if size < now), default=None)


@contextlib.contextmanager
def out_of_memory_told(config: PretrainConfig, world_size: int) -> Iterator[None]:
    """Inside, memory that does not suffice is a UserError that names the settings which take less of it.

    It is the error of this rank alone: a failed allocation amid a backward pass leaves a rank unable to take part in
    the collectives that the others wait in.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)):
            raise
        raise UserError(_sentence(config, world_size)) from error


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
