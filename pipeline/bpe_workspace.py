"""Working memory of the tokenizer's kernels: arrays, and the tuples of addresses that kernels are handed.

Whoever holds a tuple keeps the arrays alive that it points into.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.bpe_memory_kernels import BLOCK_BYTES
from pipeline.bpe_scan_kernels import END_SLACK, Scanner
from pipeline.bpe_table_kernels import ENTRY_BYTES, KEPT_BYTES, Table, key_masks, rehash
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
    """Working memory for scans that find max_pieces pieces at a time, and the arrays it consists of."""
    ends, block = np.empty(max_pieces + BLOCK_BYTES + END_SLACK, np.int64), np.zeros(BLOCK_BYTES, np.uint8)
    classes = character_classes()
    return Scanner(classes.ctypes.data, ends.ctypes.data, max_pieces, block.ctypes.data), [ends, block, classes]


class PieceTable:
    """An empty table of pieces (bpe_table_kernels.py) that can grow; view is what kernels take, anew after a change."""

    view: Table

    def __init__(self, num_slots: int, *, load: float, kept_room: int, spilled_room: int) -> None:
        """num_slots: a power of two, of which the share load may be used. kept_room, spilled_room: bytes of long pieces
        and ids that do not fit into an entry; memory that is not touched before it is used."""
        self._load = load
        self._entries = zeroed(num_slots * ENTRY_BYTES)
        self._masks, self.used = np.array(key_masks(), np.uint64), np.zeros(3, np.int64)
        self._kept_bytes, self._spilled = np.empty(kept_room, np.uint8), np.empty(spilled_room, np.uint32)
        self._look()

    @property
    def num_slots(self) -> int:
        """Entries that there are, used or not."""
        return self._entries.size // ENTRY_BYTES

    @property
    def arrays(self) -> Arrays:
        """What view points into."""
        return [self._entries, self._masks, self.used, self._kept_bytes, self._spilled]

    def grow(self, times: int) -> None:
        """More slots, the pieces that are there kept; times is a power of two."""
        old, old_entries = self.view, self._entries
        self._entries = zeroed(times * old_entries.size)
        self._look()
        rehash(old, self.view)

    def keep_room(self, num_bytes: int) -> None:
        """Make sure that so many more bytes of long pieces have room."""
        if self.used[KEPT_BYTES] + num_bytes > self._kept_bytes.size:
            larger = np.empty(2 * self._kept_bytes.size + num_bytes, np.uint8)
            larger[: self._kept_bytes.size] = self._kept_bytes
            self._kept_bytes = larger
            self._look()

    def clear(self) -> None:
        """Forget all pieces."""
        self._entries[:] = 0
        self.used[:] = 0

    def _look(self) -> None:
        self.view = Table(
            entries=self._entries.ctypes.data,
            entries_end=self._entries.ctypes.data + self._entries.size,
            shift=65 - self.num_slots.bit_length(),
            most_entries=int(self.num_slots * self._load),
            key_masks=self._masks.ctypes.data,
            kept_bytes=self._kept_bytes.ctypes.data,
            kept_room=self._kept_bytes.size,
            spilled=self._spilled.ctypes.data,
            spilled_room=self._spilled.size,
            used=self.used.ctypes.data,
        )
