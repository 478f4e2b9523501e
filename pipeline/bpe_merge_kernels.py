"""The numba loops that merge the bytes of one piece into ids, the earliest learned merge first: what a miss takes.

Two ways to the same result: ``merge_short`` looks through all pairs for the one of lowest rank, which is the fastest as
long as pieces are words; ``merge_long`` keeps the pairs in a heap, so that a run of a million letters takes n log n
steps and not n squared.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.bpe_memory_kernels import ALL_ONES, get_32, load_byte, load_word, put_32, signed, store_word
from pipeline.bpe_table_kernels import HALF, MULTIPLIER_2
from pipeline.kernel_cache import helper, inlined, kernel

HEAP_BYTES = 128  # from here on a heap pays
NO_MERGE = ALL_ONES
LOW_HALF = np.uint64(0xFFFFFFFF)
SLOT_SHIFT = np.uint64(4)  # log2 of the bytes of a slot
RANK_SHIFT = np.uint64(40)  # heap keys are rank << 40 | position: 2**24 ranks, 2**40 positions
POSITION_MASK = np.uint64((1 << 40) - 1)


class Merges(NamedTuple):
    """What a pair of ids becomes: rank << 32 | id, all ones where it is not merged. Addresses, but for the shift."""

    byte_ids: int  # uint32 of 256: id of every byte
    byte_pairs: int  # uint64 of 65,536: of every two bytes, at first << 8 | second
    slots: int  # of every pair, in an open hash table: uint64 left << 32 | right, all ones where empty; uint64 value
    shift: int  # 64 - log2(slots)
    mask: int  # slots - 1


@inlined
def slot_of(key: np.uint64, merges: Merges) -> np.uint64:
    """Where the search for a pair begins."""
    return (key ^ key >> HALF) * MULTIPLIER_2 >> np.uint64(merges.shift)


@inlined
def pair_value(merges: Merges, left: int, right: int) -> np.uint64:
    """rank << 32 | id of a pair of ids, all ones where the vocabulary does not merge it."""
    key = np.uint64(left) << HALF | np.uint64(right)
    slot = slot_of(key, merges)
    while True:
        address = merges.slots + signed(slot << SLOT_SHIFT)
        found = load_word(address)
        if found == key:
            return load_word(address + 8)
        if found == ALL_ONES:
            return NO_MERGE
        slot = (slot + np.uint64(1)) & np.uint64(merges.mask)


@kernel
def build_merges(pairs: npt.NDArray[np.uint32], ids: npt.NDArray[np.uint32], merges: Merges) -> None:
    """Enter (left, right) -> (rank, id) for every row of pairs, and the pairs of bytes; all was ones before."""
    for rank in range(len(pairs)):
        key = np.uint64(pairs[rank, 0]) << HALF | np.uint64(pairs[rank, 1])
        slot = slot_of(key, merges)
        while load_word(merges.slots + signed(slot << SLOT_SHIFT)) != ALL_ONES:
            slot = (slot + np.uint64(1)) & np.uint64(merges.mask)
        address = merges.slots + signed(slot << SLOT_SHIFT)
        store_word(address, key)
        store_word(address + 8, np.uint64(rank) << HALF | np.uint64(ids[rank]))
    for first in range(256):
        for second in range(256):
            value = pair_value(merges, get_32(merges.byte_ids, first), get_32(merges.byte_ids, second))
            store_word(merges.byte_pairs + 8 * (first << 8 | second), value)


@helper
def merge_short(address: int, length: int, merges: Merges, ids: int, pairs: int) -> int:
    """Ids of a piece of at most HEAP_BYTES into ids (uint32); returns how many. O(length^2).

    pairs (uint64) is working space, as large as ids: the value of every pair of neighbours.
    """
    before = load_byte(address)
    put_32(ids, 0, get_32(merges.byte_ids, before))
    for index in range(1, length):
        byte = load_byte(address + index)
        put_32(ids, index, get_32(merges.byte_ids, byte))
        store_word(pairs + 8 * index - 8, load_word(merges.byte_pairs + 8 * (before << 8 | byte)))
        before = byte
    count = length
    while count > 1:
        best, least = 0, NO_MERGE
        for index in range(count - 1):
            value = load_word(pairs + 8 * index)
            if value < least:
                best, least = index, value
        if least == NO_MERGE:
            break
        count -= 1
        put_32(ids, best, signed(least & LOW_HALF))
        for index in range(best + 1, count):
            put_32(ids, index, get_32(ids, index + 1))
            store_word(pairs + 8 * index - 8, load_word(pairs + 8 * index))
        if best > 0:
            store_word(pairs + 8 * best - 8, pair_value(merges, get_32(ids, best - 1), get_32(ids, best)))
        if best + 1 < count:
            store_word(pairs + 8 * best, pair_value(merges, get_32(ids, best), get_32(ids, best + 1)))
    return count


@helper
def heap_push(heap: npt.NDArray[np.uint64], size: int, key: np.uint64) -> int:
    """Put a key into a binary heap, the least on top; returns the new size."""
    hole = size
    while hole > 0 and heap[(hole - 1) >> 1] > key:
        heap[hole] = heap[(hole - 1) >> 1]
        hole = (hole - 1) >> 1
    heap[hole] = key
    return size + 1


@helper
def heap_pop(heap: npt.NDArray[np.uint64], size: int) -> int:
    """Remove the top of a heap that is not empty; returns the new size."""
    size -= 1
    key = heap[size]
    hole = 0
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = key
    return size


@helper
def merge_long(address: int, length: int, merges: Merges, ids: npt.NDArray[np.uint32]) -> int:
    """Ids of a piece of any length into ids (length,); returns how many. O(length log length), 52 bytes a byte.

    Every byte is a node of a linked list; pairs wait in a heap ordered by (rank, position). A pair that has changed
    since is told by its rank, which node i keeps in pairs[i].
    """
    following = np.empty(length, np.int64)
    preceding = np.empty(length, np.int64)
    pairs = np.empty(length, np.uint64)
    heap = np.empty(3 * length, np.uint64)  # one a pair at first, two more for each merge at most
    size = 0
    for node in range(length):
        ids[node] = get_32(merges.byte_ids, load_byte(address + node))
        following[node] = node + 1
        preceding[node] = node - 1
    for node in range(length):
        pairs[node] = NO_MERGE
        if node + 1 < length:
            size = offer(node, node + 1, merges, ids, pairs, heap, size)
    while size > 0:
        rank = heap[0] >> RANK_SHIFT
        node = signed(heap[0] & POSITION_MASK)
        size = heap_pop(heap, size)
        if pairs[node] >> HALF != rank:
            continue
        ids[node] = np.uint32(pairs[node] & LOW_HALF)
        gone = following[node]
        pairs[gone] = NO_MERGE
        pairs[node] = NO_MERGE
        following[node] = following[gone]
        if following[node] < length:
            preceding[following[node]] = node
            size = offer(node, following[node], merges, ids, pairs, heap, size)
        if preceding[node] >= 0:
            size = offer(preceding[node], node, merges, ids, pairs, heap, size)
    count = 0
    node = 0
    while node < length:
        ids[count] = ids[node]
        count += 1
        node = following[node]
    return count


@helper
def offer(
    node: int,
    other: int,
    merges: Merges,
    ids: npt.NDArray[np.uint32],
    pairs: npt.NDArray[np.uint64],
    heap: npt.NDArray[np.uint64],
    size: int,
) -> int:
    """Note the pair of two neighbours and put it into the heap if it can be merged; returns the heap's size."""
    value = pair_value(merges, signed(ids[node]), signed(ids[other]))
    pairs[node] = value
    if value == NO_MERGE:
        return size
    return heap_push(heap, size, value >> HALF << RANK_SHIFT | np.uint64(node))
