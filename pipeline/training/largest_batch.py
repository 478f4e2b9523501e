"""--batch_size auto: the largest micro-batch that the GPU's memory takes, found once and noted in the run's folder.

Nothing is tried that is expected to fail: a failed allocation amid the collectives of several workers cannot be taken
back. The memory that a micro-batch takes grows in a straight line with its windows. So two small ones are measured,
then the largest size for which the line has room, and so on until there is no larger one. What is measured is the
run's own forward and backward pass, with weights, gradients and optimizer state in their places; it changes none of
them and draws no random number. A resumed run takes the size that is noted, because another one would add in another
order; it is found anew for other workers, another GPU or other settings that memory depends on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from model.transformer import Transformer
from pipeline.config.training import PretrainConfig
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import set_gradient_sync
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder
from pipeline.training.batch_size import out_of_memory_told, possible_sizes, windows_per_worker

logger = logging.getLogger(__name__)

NOTE_FILE = "batch_size.json"
_CPU_WINDOWS = 32  # the recipe's; a CPU's step gets no faster with more
_USABLE = 0.92  # of a GPU's memory; what the allocator holds has gaps
_MOST_GROWTH = 8  # from one measurement to the next, so that a line that is wrong does no harm
_SETTINGS = ("context_length", "tokens_per_step", "optimizer", "precision", "compile", "recompute", "deterministic")


class Memory(Protocol):
    """The memory of one device; a test may put another in its place."""

    def limit(self) -> int:
        """Bytes that this process may take, what it has already included."""

    def forget_peak(self) -> None:
        """Begin to measure the peak anew."""

    def peak(self) -> int:
        """The most bytes that were taken since."""


class CudaMemory:
    """Of a GPU, as torch's allocator counts it; what others take of it is not ours."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def limit(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - total * (1 - _USABLE))

    def forget_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def device_memory(device: torch.device) -> Memory | None:
    """What can be measured of ``device``; None for a CPU, whose memory does not set the size."""
    return CudaMemory(device) if device.type == "cuda" else None


def with_batch_size(
    config: PretrainConfig, model: Transformer, *, output: Folder, workers: ProcessGroup
) -> PretrainConfig:
    """``config``, with a number in place of batch_size auto. Collective.

    Args:
        model: as it will be trained, its optimizer's state allocated.
        output: the run's folder, with the note.

    Raises:
        UserError: one window is too much already.
    """
    if config.batch_size != "auto":
        return config
    sizes = possible_sizes(windows_per_worker(config, workers.world_size))
    memory = device_memory(workers.device)
    if memory is None:
        return replace(config, batch_size=max(size for size in sizes if size <= _CPU_WINDOWS))
    key = _key(config, model, workers)
    found = workers.broadcast_int(_noted(output, key) if workers.is_rank_zero else 0)
    if not found:
        probe = Probe(config, model, workers, memory)
        found = largest_that_fits(sizes, probe.measure, limit=memory.limit(), agree=workers.all_reduce_min)
        memory.forget_peak()
        if workers.is_rank_zero:
            _note(output, key, found)
            logger.info("batch_size auto: micro-batches of %d windows, the largest that fits", found)
    return replace(config, batch_size=found)


def largest_that_fits(
    sizes: Sequence[int], measure: Callable[[int], int], *, limit: int, agree: Callable[[int], int]
) -> int:
    """The largest of ``sizes`` that takes at most ``limit`` bytes on every rank. Collective where ``agree`` is.

    Args:
        sizes: windows of a micro-batch, rising.
        measure: windows -> bytes.
        agree: a number of each rank -> the smallest of them, on every rank.

    Raises:
        UserError: not even the first of them does.
    """
    taken = {size: measure(size) for size in sizes[:2]}
    while following := agree(_following(sizes, taken, limit)):
        taken[following] = measure(following)
    best = agree(max((size for size in taken if taken[size] <= limit), default=0))
    if best == 0:
        raise UserError(
            f"a micro-batch of one window takes {taken[sizes[0]] / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB of the "
            "GPU's memory may be used; give --recompute blocks, more workers, a smaller model or a shorter "
            "context_length"
        )
    return best


def _following(sizes: Sequence[int], taken: Mapping[int, int], limit: int) -> int:
    """The size to measure next: the largest that should fit and is larger than any that does; 0 where none is."""
    fits = [size for size in taken if taken[size] <= limit]
    if not fits or len(taken) < 2:
        return 0
    low = max(fits)
    above = [size for size in taken if size > low]  # measured, and too large
    left, right = (low, min(above)) if above else sorted(taken)[-2:]
    slope = max(0.0, (taken[right] - taken[left]) / (right - left))
    most = min(above, default=_MOST_GROWTH * low + 1)
    return max((size for size in sizes if low < size < most and taken[low] + slope * (size - low) <= limit), default=0)


class Probe:
    """Measures what the run's own micro-batches take."""

    def __init__(self, config: PretrainConfig, model: Transformer, workers: ProcessGroup, memory: Memory) -> None:
        self.config, self.model, self.workers, self.memory = config, model, workers, memory
        self.windows = windows_per_worker(config, workers.world_size)

    def measure(self, size: int) -> int:
        """The most bytes taken while gradients of micro-batches of ``size`` windows are added up. Collective."""
        shape = (size, self.config.context_length)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.workers.device)
        self.memory.forget_peak()
        told = out_of_memory_told(replace(self.config, batch_size=size), self.workers.world_size)
        with told, deterministic(self.workers.device, enabled=self.config.deterministic == "on"):
            for is_last in (True,) if size == self.windows else (False, True):
                set_gradient_sync(self.model, enabled=is_last)
                (self.model(tokens, tokens) * 0.0).backward()
            taken = self.memory.peak()
        self.model.zero_grad(set_to_none=True)
        torch._dynamo.reset()  # each size is compiled for itself, and only so many are before torch gives up
        return taken


def _key(config: PretrainConfig, model: Transformer, workers: ProcessGroup) -> dict[str, Any]:
    """What the memory of a micro-batch depends on."""
    device = torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else workers.device.type
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return {"workers": workers.world_size, "device": device, "model": model.config.to_dict(), **settings}


def _notes(output: Folder) -> list[dict[str, Any]]:
    try:
        return list(json.loads(output.read(NOTE_FILE)))
    except FileNotFoundError:
        return []


def _noted(output: Folder, key: Mapping[str, Any]) -> int:
    """The size that was found before for ``key``; 0 where none was."""
    return next((note["batch_size"] for note in _notes(output) if note["found_for"] == key), 0)


def _note(output: Folder, key: Mapping[str, Any], batch_size: int) -> None:
    notes = [*_notes(output), {"batch_size": batch_size, "found_for": dict(key)}]
    output.make()
    output.write(NOTE_FILE, [json.dumps(notes, indent=2).encode()])
