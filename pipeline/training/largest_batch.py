"""--batch_size auto: the largest micro-batch that fits into GPU memory, found once and saved in the run folder.

No size is tried that is expected to fail: a failed allocation during the collectives of several workers cannot be
undone. Memory grows linearly with the windows of a micro-batch. So two small sizes are measured, then the largest one
that fits by linear extrapolation, and so on until there is no larger one. The measurement runs forward and backward of
the run itself, with weights, gradients and optimizer state allocated; it changes none of them and draws no random
number. A resumed run takes the saved size, because another one would sum in another order; a new size is found for
another number of workers, another GPU or other settings that memory depends on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from model.transformer import Transformer
from pipeline.config.training import PretrainConfig
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import set_gradient_sync
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.run_files import BATCH_SIZES_FILE
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import read_json, write_json
from pipeline.training.batch_size import out_of_memory_explained, possible_sizes, windows_per_worker

logger = logging.getLogger(__name__)

_CPU_WINDOWS = 32  # as in the recipe; on a CPU larger ones are not faster
_USABLE = 0.92  # share of GPU memory; the allocator loses some to fragmentation
_MOST_GROWTH = 8  # from one measurement to the next, in case the extrapolation is wrong
_SETTINGS = ("context_length", "tokens_per_step", "optimizer", "precision", "compile", "recompute", "deterministic")


class CudaMemory:
    """The memory of a GPU as torch's allocator counts it, without what other processes use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def limit(self) -> int:
        """Bytes that this process may use, including those that it uses now."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - total * (1 - _USABLE))

    def reset_peak(self) -> None:
        """Begin to measure the peak anew."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Peak number of bytes in use since the reset."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def device_memory(device: torch.device) -> CudaMemory | None:
    """The memory of ``device``; None for a CPU, whose memory does not limit the size."""
    return CudaMemory(device) if device.type == "cuda" else None


def with_batch_size(
    config: PretrainConfig, model: Transformer, *, output: Folder, workers: ProcessGroup
) -> PretrainConfig:
    """``config`` with a number in place of batch_size auto. Collective.

    Args:
        model: the model to train; its optimizer state is allocated.
        output: the run folder, where the found sizes are saved.

    Raises:
        UserError: not even one window fits.
    """
    if config.batch_size != "auto":
        return config
    sizes = possible_sizes(windows_per_worker(config, workers.world_size))
    memory = device_memory(workers.device)
    if memory is None:
        return replace(config, batch_size=max(size for size in sizes if size <= _CPU_WINDOWS))
    key = _key(config, model, workers)
    found = workers.broadcast_int(_known_size(output, key) if workers.is_rank_zero else 0)
    if not found:
        needed = functools.partial(measure, config, model, workers, memory)
        found = largest_that_fits(sizes, needed, limit=memory.limit(), min_over_ranks=workers.all_reduce_min)
        memory.reset_peak()
        if workers.is_rank_zero:
            _save_size(output, key, found)
            logger.info("batch_size auto: micro-batches of %d windows, the largest that fits", found)
    return replace(config, batch_size=found)


def largest_that_fits(
    sizes: Sequence[int], measure: Callable[[int], int], *, limit: int, min_over_ranks: Callable[[int], int]
) -> int:
    """The largest of ``sizes`` that needs at most ``limit`` bytes on every rank. Collective if ``min_over_ranks`` is.

    Args:
        sizes: possible numbers of windows in a micro-batch, ascending.
        measure: from a number of windows to the peak number of bytes.
        min_over_ranks: from an integer of each rank to the smallest, on every rank.

    Raises:
        UserError: the smallest size needs more.
    """
    taken = {size: measure(size) for size in sizes[:2]}
    while following := min_over_ranks(_following(sizes, taken, limit)):
        taken[following] = measure(following)
    best = min_over_ranks(max((size for size in taken if taken[size] <= limit), default=0))
    if best == 0:
        raise UserError(
            f"a micro-batch of one window takes {taken[sizes[0]] / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB of the "
            "GPU's memory may be used; give --recompute blocks, more workers, a smaller model or a shorter "
            "context_length"
        )
    return best


def _following(sizes: Sequence[int], taken: Mapping[int, int], limit: int) -> int:
    """The size to measure next: the largest that should fit, above those that do; 0 if there is none."""
    fits = [size for size in taken if taken[size] <= limit]
    if not fits or len(taken) < 2:
        return 0
    low = max(fits)
    above = [size for size in taken if size > low]  # measured, but too large
    left, right = (low, min(above)) if above else sorted(taken)[-2:]
    slope = max(0.0, (taken[right] - taken[left]) / (right - left))
    most = min(above, default=_MOST_GROWTH * low + 1)
    return max((size for size in sizes if low < size < most and taken[low] + slope * (size - low) <= limit), default=0)


def measure(config: PretrainConfig, model: Transformer, workers: ProcessGroup, memory: CudaMemory, size: int) -> int:
    """Peak bytes while gradients of micro-batches of ``size`` windows are accumulated. Collective."""
    tokens = torch.zeros((size, config.context_length), dtype=torch.int64, device=workers.device)
    memory.reset_peak()
    explained = out_of_memory_explained(replace(config, batch_size=size), workers.world_size)
    with explained, deterministic(workers.device, enabled=config.deterministic == "on"):
        for is_last in (True,) if size == windows_per_worker(config, workers.world_size) else (False, True):
            set_gradient_sync(model, enabled=is_last)
            documents = tokens if config.document_mask else None
            (model(tokens, tokens, documents=documents, all_count=config.document_mask) * 0.0).backward()
        taken = memory.peak()
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()  # each size is compiled anew, and torch limits the number of compilations
    return taken


def _key(config: PretrainConfig, model: Transformer, workers: ProcessGroup) -> dict[str, Any]:
    """All that the memory of a micro-batch depends on."""
    device = torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else workers.device.type
    settings = {name: getattr(config, name) for name in _SETTINGS}
    if config.document_mask:  # sizes that older versions saved were found without it
        settings["document_mask"] = True
    return {"workers": workers.world_size, "device": device, "model": model.config.to_dict(), **settings}


def _known_size(output: Folder, key: Mapping[str, Any]) -> int:
    """The saved size for ``key``, or 0."""
    return next((entry.batch_size for entry in _read_sizes(output) if entry.found_for == key), 0)


def _save_size(output: Folder, key: Mapping[str, Any], batch_size: int) -> None:
    sizes = [*_read_sizes(output), _FoundSize(batch_size=batch_size, found_for=dict(key))]
    output.make()
    write_json(output, BATCH_SIZES_FILE, list(map(asdict, sizes)), indent=2)


@dataclass(frozen=True, kw_only=True)
class _FoundSize:
    """An entry of the file."""

    batch_size: int
    found_for: dict[str, Any]


def _read_sizes(output: Folder) -> list[_FoundSize]:
    return read_json(output, BATCH_SIZES_FILE, list[_FoundSize], mend="delete it; the size is searched again") or []
