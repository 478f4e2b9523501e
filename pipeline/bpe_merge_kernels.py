"""The numba loops that merge the bytes of one piece into ids, the earliest learned merge first: what a miss takes.

Every byte has a place. A word of bits (for a long piece, many) says at which places a token starts, ``ids`` which one,
``ranks`` when the merge of this token with the next was learned. The least rank is merged, the first of several, until
none is left:

    bytes     l   o   w   e   r        ranks of l+o, o+w, w+e, e+r; say e+r is the least
    starts    1   1   1   1   0        "er" starts where e did; ranks of w+er, and er+what follows, are looked up
    starts    1   0   1   1   0        "lo", and so on

Up to 64 bytes, the least of the ranks is found by looking at all of them, 16 at a time. A longer piece keeps them in a
tree, in which every node is the least of the 16 below: a run of a million letters takes n log n steps and not n squared.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.bpe_memory_kernels import (
    ALL_ONES,
    ONE,
    get_32,
    leading_zeros,
    least,
    load_byte,
    load_word,
    low_bits,
    put_32,
    signed,
    store_word,
    trailing_zeros,
)
from pipeline.kernel_cache import helper, inlined, kernel

SHORT_MERGE_BYTES = 64  # a word of bits
NO_RANK = 0xFFFFFFFF
MAX_TREE_LEVELS = 16
NOTHING = np.uint64(0)
RANK_BITS = np.uint64(24)
RANK_MASK = np.uint64((1 << 24) - 1)
TOKEN_BITS = np.uint64(20)  # so that two ids and a rank make a word
WORD_SHIFT = np.uint64(3)
HASH_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


class Merges(NamedTuple):
    """Which pairs of ids are merged, and to what. Addresses, but for the last two."""

    byte_ids: int  # uint32 of 256: id of every byte
    byte_ranks: int  # uint32 of 65,536: rank of every two bytes, at first << 8 | second, NO_RANK where not merged
    merged_ids: int  # uint32: id that the merge of a rank makes
    slots: int  # uint64, an open hash table of all merges: left << 44 | right << 24 | rank; all ones where empty
    shift: int  # 64 - log2(slots)
    mask: int  # slots - 1


@inlined
def slot_of(key: np.uint64, merges: Merges) -> np.uint64:
    """Where the search for a pair begins."""
    return key * HASH_MULTIPLIER >> np.uint64(merges.shift)


@inlined
def rank_of(merges: Merges, left: int, right: int) -> int:
    """Rank of a pair of ids, NO_RANK where it is not merged."""
    key = np.uint64(left) << TOKEN_BITS | np.uint64(right)
    slot = slot_of(key, merges)
    while True:
        found = load_word(merges.slots + signed(slot << WORD_SHIFT))
        if found >> RANK_BITS == key:
            return signed(found & RANK_MASK)
        if found == ALL_ONES:
            return NO_RANK
        slot = (slot + ONE) & np.uint64(merges.mask)


@kernel
def build_merges(pairs: npt.NDArray[np.uint32], merges: Merges) -> None:
    """Enter every row (left, right) of pairs, whose rank is its number, and the pairs of bytes; slots are empty."""
    for rank in range(len(pairs)):
        key = np.uint64(pairs[rank, 0]) << TOKEN_BITS | np.uint64(pairs[rank, 1])
        slot = slot_of(key, merges)
        while load_word(merges.slots + signed(slot << WORD_SHIFT)) != ALL_ONES:
            slot = (slot + ONE) & np.uint64(merges.mask)
        store_word(merges.slots + signed(slot << WORD_SHIFT), key << RANK_BITS | np.uint64(rank))
    for first in range(256):
        for second in range(256):
            rank = rank_of(merges, get_32(merges.byte_ids, first), get_32(merges.byte_ids, second))
            put_32(merges.byte_ranks, first << 8 | second, rank)


@inlined
def begin(address: int, length: int, merges: Merges, ids: int, ranks: int) -> None:
    """A token for every byte, and the ranks of all neighbours."""
    before = load_byte(address)
    put_32(ids, 0, get_32(merges.byte_ids, before))
    for place in range(1, length):
        byte = load_byte(address + place)
        put_32(ids, place, get_32(merges.byte_ids, byte))
        put_32(ranks, place - 1, get_32(merges.byte_ranks, before << 8 | byte))
        before = byte


@helper
def merge_short(address: int, length: int, merges: Merges, ids: int, ranks: int) -> int:
    """Ids of a piece of at most SHORT_MERGE_BYTES into ids; returns how many. ids, ranks: uint32 of so many."""
    blocks = (length + 14) >> 4  # of 16; the last byte has no rank
    for pair in range(8 * blocks):
        store_word(ranks + 8 * pair, ALL_ONES)
    begin(address, length, merges, ids, ranks)
    starts = ALL_ONES >> np.uint64(64 - length)
    while starts & (starts - ONE) != NOTHING:
        rank, place = least(ranks)
        for block in range(1, blocks):
            other_rank, other_place = least(ranks + 64 * block)
            if other_rank < rank:
                rank, place = other_rank, 16 * block + other_place
        if rank == NO_RANK:
            break
        token = get_32(merges.merged_ids, rank)
        put_32(ids, place, token)
        behind = starts & (ALL_ONES << ONE << np.uint64(place))
        gone = trailing_zeros(behind)
        starts ^= ONE << np.uint64(gone)
        behind &= starts
        put_32(ranks, gone, NO_RANK)
        put_32(ranks, place, NO_RANK)
        if behind != NOTHING:
            put_32(ranks, place, rank_of(merges, token, get_32(ids, trailing_zeros(behind))))
        before = starts & low_bits(place)
        if before != NOTHING:
            left = 63 - leading_zeros(before)
            put_32(ranks, left, rank_of(merges, get_32(ids, left), token))
    count = 0
    while starts != NOTHING:
        put_32(ids, count, get_32(ids, trailing_zeros(starts)))
        starts &= starts - ONE
        count += 1
    return count


@helper
def merge_long(address: int, length: int, merges: Merges, ids: int) -> int:
    """Ids of a piece of any length into ids, uint32 of length; returns how many. O(n log n), 4.4 bytes a byte."""
    levels = np.empty(MAX_TREE_LEVELS, np.int64)
    num_levels = tree_levels(length, levels)
    tree = np.full(levels[num_levels], np.uint32(NO_RANK), np.uint32)
    starts = np.zeros((length >> 6) + 1, np.uint64)
    # numba frees an array after its last use by name: the addresses are taken where the caller still holds it.
    return merge_in_tree(address, length, merges, ids, tree, Tree(levels, num_levels), starts)


@helper
def merge_in_tree(
    address: int,
    length: int,
    merges: Merges,
    ids: int,
    ranks: npt.NDArray[np.uint32],
    shape: Tree,
    starts: npt.NDArray[np.uint64],
) -> int:
    """The work of merge_long, in arrays that it has made."""
    tree = ranks.ctypes.data
    begin(address, length, merges, ids, tree)
    build_tree(tree, shape)
    for place in range(length):
        starts[place >> 6] |= ONE << np.uint64(place & 63)
    while True:
        rank, place = least_of_tree(tree, shape)
        if rank == NO_RANK:
            break
        token = get_32(merges.merged_ids, rank)
        put_32(ids, place, token)
        gone = start_behind(starts, place)
        starts[gone >> 6] ^= ONE << np.uint64(gone & 63)
        set_rank(tree, shape, gone, NO_RANK)
        right, left = start_behind(starts, place), start_before(starts, place)
        set_rank(tree, shape, place, rank_of(merges, token, get_32(ids, right)) if right >= 0 else NO_RANK)
        if left >= 0:
            set_rank(tree, shape, left, rank_of(merges, get_32(ids, left), token))
    count = 0
    place = 0
    while place >= 0:
        put_32(ids, count, get_32(ids, place))
        count += 1
        place = start_behind(starts, place)
    return count


@helper
def start_behind(starts: npt.NDArray[np.uint64], place: int) -> int:
    """The next place where a token starts, -1 if there is none."""
    word = (place + 1) >> 6
    bits = starts[word] & (ALL_ONES << np.uint64((place + 1) & 63)) if word < starts.size else NOTHING
    while bits == NOTHING:
        word += 1
        if word >= starts.size:
            return -1
        bits = starts[word]
    return word << 6 | trailing_zeros(bits)


@helper
def start_before(starts: npt.NDArray[np.uint64], place: int) -> int:
    """The place before where a token starts, -1 if there is none."""
    word = place >> 6
    bits = starts[word] & low_bits(place & 63)
    while bits == NOTHING:
        word -= 1
        if word < 0:
            return -1
        bits = starts[word]
    return word << 6 | 63 - leading_zeros(bits)


# --- the tree: level 0 has a rank for every place, every further one the least of 16 neighbours below -----------------


class Tree(NamedTuple):
    """Where the levels of a tree are."""

    levels: npt.NDArray[np.int64]  # index of the first rank of each, and behind the last one the number of all
    num_levels: int


@helper
def tree_levels(length: int, levels: npt.NDArray[np.int64]) -> int:
    """Write Tree.levels; returns Tree.num_levels. Levels consist of whole blocks of 16, the last of one."""
    size = (length + 15) >> 4 << 4
    levels[0] = 0
    levels[1] = size
    num_levels = 1
    while size > 16:
        size = ((size >> 4) + 15) >> 4 << 4
        num_levels += 1
        levels[num_levels] = levels[num_levels - 1] + size
    return num_levels


@helper
def build_tree(tree: int, shape: Tree) -> None:
    """Fill the upper levels."""
    for level in range(1, shape.num_levels):
        below, here = shape.levels[level - 1], shape.levels[level]
        for block in range((here - below) >> 4):
            rank, _ = least(tree + 4 * (below + 16 * block))
            put_32(tree, here + block, rank)


@helper
def least_of_tree(tree: int, shape: Tree) -> tuple[int, int]:
    """The least rank and the first place that has it."""
    place = 0
    rank = NO_RANK
    for level in range(shape.num_levels - 1, -1, -1):
        rank, child = least(tree + 4 * (shape.levels[level] + 16 * place))
        place = 16 * place + child
    return rank, place


@helper
def set_rank(tree: int, shape: Tree, place: int, rank: int) -> None:
    """Change the rank of a place, and what follows from it above."""
    put_32(tree, place, rank)
    for level in range(1, shape.num_levels):
        rank, _ = least(tree + 4 * (shape.levels[level - 1] + (place >> 4 << 4)))
        place >>= 4
        if get_32(tree, shape.levels[level] + place) & NO_RANK == rank:
            return
        put_32(tree, shape.levels[level] + place, rank)
