"""Working memory of the tokenizer's kernels: arrays, and the tuples of addresses that are passed to kernels.

Whoever holds a tuple must keep the arrays alive that it points into.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.encode import Encoder
from pipeline.tokenizer.kernels.hash_table import ENTRY_BYTES, KEPT_BYTES, Table, key_masks, rehash
from pipeline.tokenizer.kernels.memory import BLOCK_BYTES
from pipeline.tokenizer.kernels.merge_short import (
    GUARD,
    NO_RANK,
    NO_TOKEN,
    SHORT_MERGE_BYTES,
    Merges,
    build_characters,
    build_merges,
)
from pipeline.tokenizer.kernels.split_gpt2 import END_SLACK, Scanner
from pipeline.tokenizer.unicode_table import character_classes

HUGE_PAGE_BYTES = 2 << 20

Arrays: TypeAlias = list[npt.NDArray[Any]]


def zeroed(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, uint8 of num_bytes, in huge pages where the system has them.

    A look-up in a table of many MB misses the processor's TLB as well as its caches; with pages of 2 MiB instead of
    4 KiB it does not miss the TLB.
    """
    if num_bytes < HUGE_PAGE_BYTES:
        return np.zeros(num_bytes, np.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    return array[-array.ctypes.data % HUGE_PAGE_BYTES :][:num_bytes]


def new_scanner(max_pretokens: int) -> tuple[Scanner, Arrays]:
    """Working memory for scans that find max_pretokens at a time, and the arrays that it consists of."""
    ends, block = np.empty(max_pretokens + BLOCK_BYTES + END_SLACK, np.int64), np.zeros(BLOCK_BYTES, np.uint8)
    classes = character_classes()
    return Scanner(classes.ctypes.data, ends.ctypes.data, max_pretokens, block.ctypes.data), [ends, block, classes]


def merge_space() -> tuple[tuple[int, int], Arrays]:
    """Addresses of the ids and ranks that merge_short works with, and the arrays that they lie in."""
    arrays: Arrays = [np.full(SHORT_MERGE_BYTES + 2 * GUARD, NO_TOKEN, np.uint32) for _ in range(2)]
    ids, ranks = (array.ctypes.data + GUARD * array.itemsize for array in arrays)
    return (ids, ranks), arrays


def new_merges(
    tokens: Sequence[bytes], merges: Sequence[tuple[int, int]], byte_ids: list[int], merged_ids: list[int]
) -> tuple[Merges, Arrays]:
    """The merges of a vocabulary as look-up tables for the kernels, and the arrays that they consist of.

    byte_ids: ids of the 256 bytes. merged_ids: id that every merge produces.
    """
    pairs = np.array(merges, np.uint32).reshape(len(merges), 2)
    byte_array, merged_array = np.array(byte_ids, np.uint32), np.array(merged_ids, np.uint32)
    byte_pairs, neighbours, characters = _borders(tokens, pairs), _neighbours(tokens), np.empty(1 << 16, np.uint64)
    log_slots = max(4, (len(pairs) * 5 // 4).bit_length())
    while True:
        log_buckets = log_slots - 2
        displacements, slots = np.zeros(1 << log_buckets, np.uint16), np.full(1 << log_slots, 2**64 - 1, np.uint64)
        view = Merges(
            byte_ids=byte_array.ctypes.data,
            neighbours=neighbours.ctypes.data,
            byte_pairs=byte_pairs.ctypes.data,
            characters=characters.ctypes.data,
            merged_ids=merged_array.ctypes.data,
            displacements=displacements.ctypes.data,
            slots=slots.ctypes.data,
            first_merged_id=_first_in_order(merged_ids),
            bucket_shift=64 - log_buckets,
            mask=slots.size - 1,
        )
        if build_merges(pairs, view):
            (ids, ranks), _space = merge_space()
            build_characters(view, ids, ranks)
            return view, [byte_array, neighbours, byte_pairs, characters, merged_array, displacements, slots]
        log_slots += 1


def _neighbours(tokens: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """Whether some token has two bytes next to each other, at first | second << 8: uint8 of 65,536, 0 or 1."""
    content = np.frombuffer(b"".join(tokens), np.uint8).astype(np.int64)
    last = np.cumsum([len(token) for token in tokens]) - 1
    is_inside = np.ones(content.size, bool)
    is_inside[last] = False  # the next byte belongs to another token
    found = np.zeros(1 << 16, np.uint8)
    found[(content[:-1] | content[1:] << 8)[is_inside[:-1]]] = 1
    return found


def _borders(tokens: Sequence[bytes], pairs: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Least rank of a merge that joins two neighbouring bytes, in the upper half of uint64 of 65,536, at
    first | second << 8."""
    content = np.frombuffer(b"".join(tokens) + b"\0", np.uint8).astype(np.int64)  # for an empty last token
    stops = np.cumsum([len(token) for token in tokens])
    first, last = content[np.concatenate([[0], stops[:-1]])[pairs[:, 1]]], content[stops[pairs[:, 0]] - 1]
    ranks = np.full(1 << 16, NO_RANK, np.uint64)
    across = last | first << 8
    ranks[across[::-1]] = np.arange(len(pairs), dtype=np.uint64)[::-1]  # the last assignment wins: the least rank
    return ranks << np.uint64(32)


def _first_in_order(ids: list[int]) -> int:
    """The first of ids that follow one another without a gap, -1 if they do not."""
    first = ids[0] if ids else 0
    return first if ids == list(range(first, first + len(ids))) else -1


class PretokenTable:
    """A growing table of pretokens (hash_table.py), empty at first; kernels take view, which changes when it grows."""

    view: Table

    def __init__(self, num_slots: int, *, load: float, kept_room: int, spilled_room: int) -> None:
        """num_slots: a power of two, of which the share load may be used.

        kept_room, spilled_room: room for bytes of long pretokens and for ids that do not fit into an entry; memory is
        allocated by the system when it is first written.
        """
        self._load = load
        self._entries = zeroed(num_slots * ENTRY_BYTES)
        self._masks, self.used = np.array(key_masks(), np.uint64), np.zeros(3, np.int64)
        self._kept_bytes, self._spilled = np.empty(kept_room, np.uint8), np.empty(spilled_room, np.uint32)
        self._update_view()

    @property
    def num_slots(self) -> int:
        """Number of entries, used or not."""
        return self._entries.size // ENTRY_BYTES

    def grow(self, times: int) -> None:
        """Multiply the number of slots by a power of two; the pretokens are kept."""
        old, old_entries = self.view, self._entries
        self._entries = zeroed(times * old_entries.size)
        self._update_view()
        rehash(old, self.view)

    def keep_room(self, num_bytes: int) -> None:
        """Make room for num_bytes more of long pretokens."""
        if self.used[KEPT_BYTES] + num_bytes > self._kept_bytes.size:
            larger = np.empty(2 * self._kept_bytes.size + num_bytes, np.uint8)
            larger[: self._kept_bytes.size] = self._kept_bytes
            self._kept_bytes = larger
            self._update_view()

    def clear(self) -> None:
        """Forget all pretokens."""
        self._entries[:] = 0
        self.used[:] = 0

    def _update_view(self) -> None:
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


class Workspace(NamedTuple):
    """Working memory of one thread: addresses for the kernels, and the arrays that they point into."""

    encoder: Encoder
    pretokens: PretokenTable
    arrays: Arrays

    def make_room(self, most_slots: int) -> None:
        """Grow the cache to most_slots, or empty it where it has as many.

        It grows in one step and early: the few pretokens in it are the frequent ones, and in a table that is almost
        empty they are stored in the slot that is looked at first.
        """
        if self.pretokens.num_slots < most_slots:
            self.pretokens.grow(most_slots // self.pretokens.num_slots)
        else:
            self.pretokens.clear()
