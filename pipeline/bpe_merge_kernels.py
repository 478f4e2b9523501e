"""The numba loops that merge the bytes of one piece into ids, the earliest learned merge first: what a miss takes.

Every byte has a place. A word of bits (for a long piece, many) says at which places a token starts, ``ids`` which one,
``ranks`` when the merge of this token with the next was learned. The least rank is merged, the first of several, until
none is left:

    bytes     l   o   w   e   r        ranks of l+o, o+w, w+e, e+r; say e+r is the least
    starts    1   1   1   1   0        "er" starts where e did; ranks of w+er, and er+what follows, are looked up
    starts    1   0   1   1   0        "lo", and so on

Up to 64 bytes, the least of the ranks is found by looking at all of them, 16 at a time. A longer piece keeps them in a
tree, in which every node is the least of the 16 below: a run of n letters takes n log n steps and not n squared.

No merge reaches across two bytes that are side by side in no token. GPT-2's tokens have 2,689 of the 65,536 pairs, so a
line of Chinese falls apart into bits of one to three bytes, each merged by itself (``merge_parts``).
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
    load_16,
    load_byte,
    load_word,
    low_bits,
    put_32,
    signed,
    store_16,
    store_word,
    trailing_zeros,
)
from pipeline.kernel_cache import helper, inlined, kernel

SHORT_MERGE_BYTES = 64  # a word of bits
GUARD = 8  # entries in front of the working space of merge_short, and behind: what is left and right of a piece
NO_TOKEN = (1 << 20) - 1  # an id that no token has
NO_RANK = 0xFFFFFFFF
MAX_TREE_LEVELS = 16
NOTHING = np.uint64(0)
RANK_BITS = np.uint64(24)
RANK_MASK = np.uint64((1 << 24) - 1)
TOKEN_BITS = np.uint64(20)  # so that two ids and a rank make a word
WORD_SHIFT = np.uint64(3)
HALF = np.uint64(32)
STEP_BITS = np.uint64(16)
STEP_MASK = np.uint64((1 << 16) - 1)
MAX_DISPLACEMENTS = 1 << 16
MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)


class Merges(NamedTuple):
    """Which pairs of ids are merged, and to what. Addresses, but for the last two.

    Pairs are found by a perfect hash ("hash and displace"): a pair's bucket has a displacement, which sends all its
    pairs to slots of their own. So a look-up is two reads and one comparison whether the pair is there or not; there is
    no search whose length the processor would have to guess.
    """

    byte_ids: int  # uint32 of 256: id of every byte
    neighbours: int  # uint8 of 65,536: whether some token has these two bytes side by side, at first << 8 | second
    byte_ranks: int  # uint32 of 65,536: rank of every two bytes, at first << 8 | second, NO_RANK where not merged
    merged_ids: int  # uint32: id that the merge of a rank makes
    displacements: int  # uint16 of every bucket
    slots: int  # uint64: left << 44 | right << 24 | rank of every merge; all ones where empty
    bucket_shift: int  # 64 - log2(buckets)
    mask: int  # slots - 1


@inlined
def pair_key(left: int, right: int) -> np.uint64:
    """A pair of ids as a word."""
    return np.uint64(left) << TOKEN_BITS | np.uint64(right)


@inlined
def pair_hash(key: np.uint64) -> np.uint64:
    """Hash of a pair; its top bits are the bucket."""
    mixed = key * MULTIPLIER_1
    return (mixed ^ (mixed >> HALF)) * MULTIPLIER_2


@inlined
def slot_address(hashed: np.uint64, displacement: int, merges: Merges) -> int:
    """Where the pair is, if it is there."""
    slot = (hashed >> STEP_BITS) + np.uint64(displacement) * (hashed & STEP_MASK | ONE)
    return merges.slots + signed((slot & np.uint64(merges.mask)) << WORD_SHIFT)


@inlined
def rank_of(merges: Merges, left: int, right: int) -> int:
    """Rank of a pair of ids, NO_RANK where it is not merged."""
    key = pair_key(left, right)
    hashed = pair_hash(key)
    displacement = load_16(merges.displacements + signed(hashed >> np.uint64(merges.bucket_shift) << ONE))
    found = load_word(slot_address(hashed, displacement, merges))
    return signed(found & RANK_MASK) if found >> RANK_BITS == key else NO_RANK


@kernel
def build_merges(pairs: npt.NDArray[np.uint32], merges: Merges) -> bool:
    """Enter every row (left, right) of pairs, whose rank is its number, and the pairs of bytes; slots are empty.

    Large buckets come first, when slots are free. False: a bucket found no displacement, more slots are needed.
    """
    num_buckets = 1 << (64 - merges.bucket_shift)
    bucket_ends = np.zeros(num_buckets + 1, np.int64)
    for rank in range(len(pairs)):
        bucket = signed(pair_hash(pair_key(pairs[rank, 0], pairs[rank, 1])) >> np.uint64(merges.bucket_shift))
        bucket_ends[bucket + 1] += 1
    largest = bucket_ends.max()
    for bucket in range(num_buckets):
        bucket_ends[bucket + 1] += bucket_ends[bucket]
    ranks = np.empty(len(pairs), np.int64)
    for rank in range(len(pairs) - 1, -1, -1):
        bucket = signed(pair_hash(pair_key(pairs[rank, 0], pairs[rank, 1])) >> np.uint64(merges.bucket_shift))
        bucket_ends[bucket + 1] -= 1  # begins here, when all are entered
        ranks[bucket_ends[bucket + 1]] = rank
    for size in range(largest, 0, -1):
        for bucket in range(num_buckets):
            start = bucket_ends[bucket + 1]
            stop = bucket_ends[bucket + 2] if bucket + 1 < num_buckets else len(pairs)
            if stop - start == size and not place_bucket(pairs, ranks[start:stop], bucket, merges):
                return False
    for first in range(256):
        for second in range(256):
            rank = rank_of(merges, get_32(merges.byte_ids, first), get_32(merges.byte_ids, second))
            put_32(merges.byte_ranks, first << 8 | second, rank)
    return True


@helper
def place_bucket(pairs: npt.NDArray[np.uint32], ranks: npt.NDArray[np.int64], bucket: int, merges: Merges) -> bool:
    """Find the least displacement that sends all pairs of a bucket to empty slots, and enter them."""
    for displacement in range(MAX_DISPLACEMENTS):
        entered = 0
        while entered < ranks.size:
            key = pair_key(pairs[ranks[entered], 0], pairs[ranks[entered], 1])
            address = slot_address(pair_hash(key), displacement, merges)
            if load_word(address) != ALL_ONES:
                break
            store_word(address, key << RANK_BITS | np.uint64(ranks[entered]))
            entered += 1
        if entered == ranks.size:
            store_16(merges.displacements + 2 * bucket, np.uint64(displacement))
            return True
        for index in range(entered):
            key = pair_key(pairs[ranks[index], 0], pairs[ranks[index], 1])
            store_word(slot_address(pair_hash(key), displacement, merges), ALL_ONES)
    return False


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
    """Ids of a piece of at most SHORT_MERGE_BYTES into ids; returns how many.

    ids, ranks: uint32 of so many, with GUARD more on both sides: ids[-1] and ids[SHORT_MERGE_BYTES] are NO_TOKEN, which
    merges with nothing, so that the first and the last token are like all others.
    """
    blocks = (length + 15) >> 4  # of 16
    for pair in range(8 * blocks):
        store_word(ranks + 8 * pair, ALL_ONES)
    begin(address, length, merges, ids, ranks)
    starts = ALL_ONES >> np.uint64(SHORT_MERGE_BYTES - length)
    while True:
        rank, place = least(ranks)
        for block in range(1, blocks):
            other_rank, other_place = least(ranks + 64 * block)
            if other_rank < rank:
                rank, place = other_rank, 16 * block + other_place
        if rank == NO_RANK:
            break
        token = get_32(merges.merged_ids, rank)
        behind = starts & (ALL_ONES << ONE << np.uint64(place))
        gone = trailing_zeros(behind)
        starts ^= ONE << np.uint64(gone)
        left, right = 63 - leading_zeros(starts & low_bits(place)), trailing_zeros(behind & starts)
        put_32(ids, place, token)
        put_32(ranks, gone, NO_RANK)
        put_32(ranks, place, rank_of(merges, token, get_32(ids, right)))
        put_32(ranks, left, rank_of(merges, get_32(ids, left), token))
    count = 0
    while starts != NOTHING:
        put_32(ids, count, get_32(ids, trailing_zeros(starts)))
        starts &= starts - ONE
        count += 1
    return count


@helper
def merge_parts(address: int, length: int, merges: Merges, ids: int, scratch: tuple[int, int]) -> int:
    """Ids of a piece of any length into ids, uint32 of length; returns how many. scratch: ids and ranks of
    merge_short."""
    count = 0
    start = 0
    while start < length:
        stop = start + 1
        before = load_byte(address + start)
        while stop < length:
            byte = load_byte(address + stop)
            if load_byte(merges.neighbours + (before << 8 | byte)) == 0:
                break
            before = byte
            stop += 1
        count += merge_part(address + start, stop - start, merges, ids + 4 * count, scratch)
        start = stop
    return count


@helper
def merge_part(address: int, length: int, merges: Merges, ids: int, scratch: tuple[int, int]) -> int:
    """The same for a part in which merges may reach anywhere."""
    first = load_byte(address)
    if length == 1:
        put_32(ids, 0, get_32(merges.byte_ids, first))
        return 1
    if length == 2:
        second = load_byte(address + 1)
        rank = get_32(merges.byte_ranks, first << 8 | second) & NO_RANK
        put_32(ids, 0, get_32(merges.merged_ids, rank) if rank != NO_RANK else get_32(merges.byte_ids, first))
        put_32(ids, 1, get_32(merges.byte_ids, second))
        return 1 if rank != NO_RANK else 2
    if length > SHORT_MERGE_BYTES:
        return merge_long(address, length, merges, ids)
    short_ids, short_ranks = scratch
    count = merge_short(address, length, merges, short_ids, short_ranks)
    for index in range(count):
        put_32(ids, index, get_32(short_ids, index))
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
