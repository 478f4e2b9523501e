"""The numba loops that merge the bytes of one pretoken into ids, the earliest learned merge first.

Every byte has a place. A bit mask (for a long pretoken, several words) says at which places a token starts, ``ids``
which token, ``ranks`` when the merge of this token with the next was learned. The pair with the least rank is merged,
the first of several, until none is left:

    bytes     l   o   w   e   r        ranks of l+o, o+w, w+e, e+r; say e+r is the least
    starts    1   1   1   1   0        "er" starts where e did; ranks of w+er, and er+what follows, are looked up
    starts    1   0   1   1   0        "lo", and so on

Up to 64 bytes, the least rank is found by comparing all of them, 16 at a time; those of a pretoken of up to 16
bytes stay in a register. Longer pretokens are merged in merge_long.py.

Half of the merges need no search (``merge_sure``). The border of two bytes has a rank too: the least of all merges that
reach across it. Two bytes whose rank is below those of the borders on both sides are merged before anything can reach
in from there, whatever happens elsewhere; so all such pairs of a pretoken are merged at once.

No merge reaches across two bytes that are side by side in no token. GPT-2's tokens have 2,689 of the 65,536 pairs, so a
line of Chinese falls apart into bits of one to three bytes, each merged by itself (``ends_of_parts``). Nine in ten of
its characters are alone in this sense, and what becomes of a character of three bytes by itself is known beforehand
(``tokens_of_character``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.memory import (
    ALL_ONES,
    ONE,
    get_32,
    leading_zeros,
    least,
    least_lane,
    less,
    load_16,
    load_byte,
    load_sixteen,
    load_word,
    low_bits,
    ones,
    put_32,
    signed,
    store_16,
    store_word,
    trailing_zeros,
    with_lane,
)

SHORT_MERGE_BYTES = 64  # a word of bits
LANES = 16
PLACE_BITS = np.uint64(4)  # below a rank in a lane, its place, so that the least has both
NO_LANE = 0xFFFFFFF0  # and above: of no rank
TWO_NO_LANES = np.uint64(0xFFFFFFF0FFFFFFF0)
GUARD = 8  # entries before and after the working memory of merge_short: the neighbours of a pretoken's ends
NOTHING = np.uint64(0)
HALF = np.uint64(32)
NO_TOKEN = (1 << 20) - 1  # an id that no token has
NO_RANK = 0xFFFFFFFF
RANK_BITS = np.uint64(24)
RANK_MASK = np.uint64((1 << 24) - 1)
TOKEN_BITS = np.uint64(20)  # so that two ids and a rank make a word
WORD_SHIFT = np.uint64(3)
STEP_BITS = np.uint64(16)
STEP_MASK = np.uint64((1 << 16) - 1)
MAX_DISPLACEMENTS = 1 << 16
CHARACTER_BITS, CHARACTER_PATTERN = 0xC0C0F0, 0x8080E0  # of three bytes of UTF-8, the first one lowest
COUNT_BITS = np.uint64(60)  # below the number of a character's ids
MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)


class Merges(NamedTuple):
    """Which pairs of ids are merged, and to what. Addresses, but for the last three. Two bytes are looked up in tables
    of all 65,536 pairs, as they lie in memory: at first | second << 8.

    Pairs are found by a perfect hash ("hash and displace"): a pair's bucket has a displacement, which sends all its
    pairs to slots of their own. So a look-up is two reads and one comparison whether the pair is there or not; there is
    no search whose length the processor would have to guess.
    """

    byte_ids: int  # uint32 of 256: id of every byte
    neighbours: int  # uint8 of 65,536: whether some token has these two bytes side by side
    byte_pairs: int  # uint64 of 65,536: rank of the border of these two bytes << 32 | rank of their merge, or NO_RANK
    characters: int  # uint64 of 65,536: ids of every character of three bytes, see tokens_of_character
    merged_ids: int  # uint32: id that the merge of a rank makes
    displacements: int  # uint16 of every bucket
    slots: int  # uint64: left << 44 | right << 24 | rank of every merge; all ones where empty
    first_merged_id: int  # that the first merge makes, if those of the others follow in order; else -1
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
    """Enter every row (left, right) of pairs, whose rank is its number, and the ranks of the pairs of bytes; slots are
    empty, and so are the lower halves of byte_pairs.

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
            put_32(merges.byte_pairs, 2 * (first | second << 8), rank)
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
def merged_id(merges: Merges, rank: int) -> int:
    """Id that the merge of a rank makes."""
    return merges.first_merged_id + rank if merges.first_merged_id >= 0 else get_32(merges.merged_ids, rank)


@inlined
def begin(address: int, length: int, merges: Merges, ids: int, ranks: int) -> None:
    """Write a token for every byte, and the ranks of all neighbouring pairs."""
    put_32(ids, 0, get_32(merges.byte_ids, load_byte(address)))
    for place in range(1, length):
        put_32(ids, place, get_32(merges.byte_ids, load_byte(address + place)))
        put_32(ranks, place - 1, get_32(merges.byte_pairs, 2 * load_16(address + place - 1)))


@inlined
def merge_short(address: int, length: int, merges: Merges, ids: int, ranks: int) -> int:
    """Ids of a pretoken of at most SHORT_MERGE_BYTES into ids; returns how many.

    ids, ranks: uint32 of so many, with GUARD more on both sides: ids[-1] and ids[SHORT_MERGE_BYTES] are NO_TOKEN, which
    merges with nothing, so that the first and the last token are like all others.
    """
    if length <= LANES:
        return merge_in_register(address, length, merges, ids, ranks)
    return merge_in_memory(address, length, merges, ids, ranks)


@helper
def merge_in_register(address: int, length: int, merges: Merges, ids: int, ranks: int) -> int:
    """merge_short up to LANES bytes; a lane is a rank << PLACE_BITS | its place."""
    starts = merge_sure(address, length, merges, ids, ranks)
    lanes = load_sixteen(ranks)
    while True:
        lane = least_lane(lanes)
        if lane >= NO_LANE:
            break
        place = lane & (LANES - 1)
        token = merged_id(merges, lane >> 4)
        behind = starts & (ALL_ONES << ONE << np.uint64(place))
        gone = trailing_zeros(behind)
        starts ^= ONE << np.uint64(gone)
        left, right = 63 - leading_zeros(starts & low_bits(place)), trailing_zeros(behind & starts)
        put_32(ids, place, token)
        lanes = with_lane(lanes, gone, NO_LANE)
        lanes = with_lane(lanes, place, rank_of(merges, token, get_32(ids, right)) << 4 | place)
        lanes = with_lane(lanes, left, rank_of(merges, get_32(ids, left), token) << 4 | left)
    return close_up(starts, ids)


@inlined
def merge_sure(address: int, length: int, merges: Merges, ids: int, ranks: int) -> np.uint64:
    """Merge the pairs of bytes that no other merge can prevent.

    Returns where tokens start; writes the tokens to ids and the lanes of their pairs to ranks, of which it uses 36.
    """
    borders = ranks + 4 * (LANES + 1)
    for two in range(LANES + 2):
        store_word(ranks + 8 * two, TWO_NO_LANES)
    put_32(ids, 0, get_32(merges.byte_ids, load_byte(address)))
    for place in range(length - 1):
        pair = load_word(merges.byte_pairs + 8 * load_16(address + place))
        put_32(ids, place + 1, get_32(merges.byte_ids, load_byte(address + place + 1)))
        put_32(ranks, place, signed(pair << PLACE_BITS) | place)
        put_32(borders, place, signed(pair >> HALF << PLACE_BITS))
    starts = ALL_ONES >> np.uint64(SHORT_MERGE_BYTES - length)
    lanes = load_sixteen(ranks)
    sure = less(lanes, load_sixteen(borders - 4)) & less(lanes, load_sixteen(borders + 4))  # never two side by side
    if sure == NOTHING:
        return starts
    starts ^= sure << ONE
    while sure != NOTHING:
        place = trailing_zeros(sure)
        put_32(ids, place, merged_id(merges, (get_32(ranks, place) & NO_RANK) >> 4))
        put_32(ranks, place + 1, NO_LANE)
        sure &= sure - ONE
    place = 0
    behind = starts & (starts - ONE)
    while behind != NOTHING:
        right = trailing_zeros(behind)
        put_32(ranks, place, rank_of(merges, get_32(ids, place), get_32(ids, right)) << 4 | place)
        place = right
        behind &= behind - ONE
    put_32(ranks, place, NO_LANE)
    return starts


@helper
def merge_in_memory(address: int, length: int, merges: Merges, ids: int, ranks: int) -> int:
    """merge_short for any length."""
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
        token = merged_id(merges, rank)
        behind = starts & (ALL_ONES << ONE << np.uint64(place))
        gone = trailing_zeros(behind)
        starts ^= ONE << np.uint64(gone)
        left, right = 63 - leading_zeros(starts & low_bits(place)), trailing_zeros(behind & starts)
        put_32(ids, place, token)
        put_32(ranks, gone, NO_RANK)
        put_32(ranks, place, rank_of(merges, token, get_32(ids, right)))
        put_32(ranks, left, rank_of(merges, get_32(ids, left), token))
    return close_up(starts, ids)


@inlined
def close_up(starts: np.uint64, ids: int) -> int:
    """Move the ids of the starts together, four at a time, with garbage after them; returns how many there are."""
    count = ones(starts)
    for done in range(0, count, 4):
        for index in range(4):
            put_32(ids, done + index, get_32(ids, trailing_zeros(starts)))
            starts &= starts - ONE
    return count


@inlined
def ends_of_parts(address: int, end: int, merges: Merges) -> np.uint64:
    """A bit for each of the up to 64 bytes from the address on: whether no merge reaches from it to the next byte."""
    count = min(64, end - address - 1)
    linked = NOTHING
    for place in range(count):
        linked |= np.uint64(load_byte(merges.neighbours + load_16(address + place))) << np.uint64(place)
    return ~linked & (low_bits(count + 1) if count < 63 else ALL_ONES)


@helper
def end_of_part(address: int, end: int, merges: Merges) -> int:
    """Where the part that begins at the address ends."""
    address += 1
    while address < end and load_byte(merges.neighbours + load_16(address - 1)) != 0:
        address += 1
    return address


@inlined
def tokens_of_two(address: int, merges: Merges) -> tuple[int, int, bool]:
    """Id of the first of two bytes or of both merged, id of the second, and whether they are merged.

    There is no branch, which a processor could not predict for Chinese text.
    """
    rank = get_32(merges.byte_pairs, 2 * load_16(address)) & NO_RANK
    is_merged = rank != NO_RANK
    merged = merged_id(merges, rank if is_merged else 0)
    first = get_32(merges.byte_ids, load_byte(address))
    return merged if is_merged else first, get_32(merges.byte_ids, load_byte(address + 1)), is_merged


@kernel
def build_characters(merges: Merges, ids: int, ranks: int) -> None:
    """Fill merges.characters; ids, ranks: working memory of merge_short."""
    text = np.empty(3, np.uint8)
    for number in range(1 << 16):
        text[0], text[1], text[2] = 0xE0 | number >> 12, 0x80 | number >> 6 & 63, 0x80 | number & 63
        count = merge_short(text.ctypes.data, 3, merges, ids, ranks)
        entry = np.uint64(count) << COUNT_BITS
        for place in range(count):
            entry |= np.uint64(get_32(ids, place)) << np.uint64(place) * TOKEN_BITS
        store_word(merges.characters + 8 * number, entry)


@inlined
def is_character(address: int) -> bool:
    """Whether the three bytes there look like a character of UTF-8."""
    return (load_16(address) | load_byte(address + 2) << 16) & CHARACTER_BITS == CHARACTER_PATTERN


@inlined
def tokens_of_character(address: int, merges: Merges) -> tuple[int, int, int, int]:
    """Three ids for a character of three bytes by itself, and how many of them are valid."""
    number = (load_byte(address) & 15) << 12 | (load_byte(address + 1) & 63) << 6 | load_byte(address + 2) & 63
    entry = load_word(merges.characters + 8 * number)
    first, second = signed(entry) & NO_TOKEN, signed(entry >> TOKEN_BITS) & NO_TOKEN
    return first, second, signed(entry >> TOKEN_BITS >> TOKEN_BITS) & NO_TOKEN, signed(entry >> COUNT_BITS)
