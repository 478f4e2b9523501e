"""Working memory of the tokenizer's kernels: arrays, and the tuples of addresses that kernels are handed.

Every maker returns the tuple and the arrays that it points into; the caller keeps the arrays alive.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.bpe_memory_kernels import BLOCK_BYTES
from pipeline.bpe_scan_kernels import END_SLACK, Scanner
from pipeline.bpe_table_kernels import ENTRY_BYTES, Table, key_masks
from pipeline.unicode_table import character_classes

HUGE_PAGE_BYTES = 2 << 20

Arrays: TypeAlias = list[npt.NDArray[Any]]


def zeroed(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, uint8 of num_bytes, in huge pages where the system has them.

    A look-up in a table of many MB misses the processor's table of pages as well as its caches; with pages of 2 MiB
    instead of 4 KiB it does not.
    """
    if num_bytes < HUGE_PAGE_BYTES:
        return np.zeros(num_bytes, np.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    return array[-array.ctypes.data % HUGE_PAGE_BYTES :][:num_bytes]


def new_scanner(max_pieces: int) -> tuple[Scanner, Arrays]:
    """Working memory for scans that find max_pieces pieces at a time."""
    ends, block = np.empty(max_pieces + BLOCK_BYTES + END_SLACK, np.int64), np.zeros(BLOCK_BYTES, np.uint8)
    classes = character_classes()
    return Scanner(classes.ctypes.data, ends.ctypes.data, max_pieces, block.ctypes.data), [ends, block, classes]


def new_table(num_slots: int, most_entries: int, kept_room: int, spilled_room: int) -> tuple[Table, Arrays]:
    """An empty table; num_slots is a power of two."""
    entries = zeroed(num_slots * ENTRY_BYTES)
    masks, used = np.array(key_masks(), np.uint64), np.zeros(3, np.int64)
    kept_bytes, spilled = np.empty(kept_room, np.uint8), np.empty(spilled_room, np.uint32)
    table = Table(
        entries=entries.ctypes.data,
        entries_end=entries.ctypes.data + entries.size,
        shift=65 - num_slots.bit_length(),
        most_entries=most_entries,
        key_masks=masks.ctypes.data,
        kept_bytes=kept_bytes.ctypes.data,
        kept_room=kept_room,
        spilled=spilled.ctypes.data,
        spilled_room=spilled_room,
        used=used.ctypes.data,
    )
    return table, [entries, masks, used, kept_bytes, spilled]
