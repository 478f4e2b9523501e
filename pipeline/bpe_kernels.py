"""The numba loops of encoding: look a piece up in a table of pieces seen before, merge its bytes where it is new.

``scan`` (bpe_scan_kernels.py) has cut the text; ``find_short`` and ``find_long`` look pieces up, for encoding and for
counting (bpe_training_kernels.py); ``merge_short`` and ``merge_long`` do what a miss takes.

All shifts, masks and products of hashes are uint64 throughout: numba turns a mix of int64 and uint64 into float64
without a word.
"""

# ruff: noqa: PLR0917  numba calls by position, and compiles comparisons better than sets

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.bpe_scan_kernels import (
    get_32,
    get_64,
    load_byte,
    load_word,
    put_32,
    put_64,
    scan,
    signed,
    store_16,
    store_32,
    store_byte,
    store_word,
)
from pipeline.kernel_cache import helper, kernel

CHUNK_PIECES = 1024  # end offsets found before they are looked up: 8 KB, stays in L1
SHORT_BYTES = 15  # longest piece whose bytes are its own key: 15 bytes and the length in 16
MAX_CACHED_BYTES = 256  # longer pieces hardly ever come twice
HEAP_BYTES = 128  # from here on merging takes a heap, O(n log n), instead of a scan, O(n^2)

ENTRY_WORDS = 4  # a table entry: two words of key, two of payload; an empty one has 0 in its second word
ENTRY_SHIFT = np.uint64(5)  # log2 of its bytes
WORD_SHIFT = np.uint64(3)
LONG_TAG = 16  # top byte of the second key word; 1..15 there is the length of a short piece
MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)
ALL_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
LOW_HALF = np.uint64(0xFFFFFFFF)
OFFSET_MASK = np.uint64(0x00FFFFFFFFFFFFFF)
HALF = np.uint64(32)
TOP_BYTE = np.uint64(56)
RANK_SHIFT = np.uint64(40)  # heap keys are rank << 40 | position: 2**24 ranks, 2**40 positions
POSITION_MASK = np.uint64((1 << 40) - 1)

ENTRIES, SPILLED, KEPT_BYTES = 0, 1, 2  # indices of Table.used
DOCUMENT, POSITION, WRITTEN = 0, 1, 2  # indices of a cursor


class Table(NamedTuple):
    """Pieces by their bytes, in a hash table with linear probing. All members are addresses or numbers."""

    entries: int  # uint64 of 4 x slots, zero where empty
    mask: int  # slots - 1; slots is a power of two
    kept_bytes: int  # uint8: of every piece above SHORT_BYTES 8 bytes of length, then the piece
    kept_room: int  # its size
    spilled: int  # uint32: ids of pieces that have more than fit into an entry
    spilled_room: int  # its size
    used: int  # int64 of 3: entries, spilled, kept_bytes in use


class Merges(NamedTuple):
    """What merging needs: an open hash table from a pair of ids to its rank and to the id it becomes. Addresses."""

    byte_ids: int  # uint32 of 256: id of every byte
    keys: int  # uint64: left << 32 | right; all ones where empty
    values: int  # uint64: rank << 32 | id
    mask: int  # slots - 1; slots is a power of two


class Encoder(NamedTuple):
    """All that encoding takes but the text. Addresses and numbers; the last three are working space."""

    classes: int  # unicode_table.character_classes
    merges: Merges
    table: Table
    id_shift: int  # log2 of the bytes of an id: 1 or 2
    ends: int  # int64 of CHUNK_PIECES
    ids: int  # uint32 of HEAP_BYTES
    pairs: int  # uint64 of HEAP_BYTES


# --- looking pieces up -----------------------------------------------------------------------------------------------


@helper
def mix(first: np.uint64, second: np.uint64) -> np.uint64:
    """Hash of two words; every bit of the result depends on all of them."""
    mixed = first ^ (second * MULTIPLIER_1)
    mixed = (mixed ^ (mixed >> HALF)) * MULTIPLIER_2
    return mixed ^ (mixed >> HALF)


@helper
def partial_word(address: int, length: int) -> np.uint64:
    """The length < 8 bytes at the address as a word, read one by one."""
    word = np.uint64(0)
    for index in range(length):
        word |= np.uint64(load_byte(address + index)) << np.uint64(8 * index)
    return word


@helper
def short_key(address: int, length: int, readable_end: int) -> tuple[np.uint64, np.uint64]:
    """Key of a piece of 1..15 bytes: its bytes, zeros behind them, and the length in the top byte."""
    size = np.uint64(length)
    if address + 16 <= readable_end:
        first = load_word(address)
        second = load_word(address + 8)
        if length <= 8:
            first &= ALL_ONES >> (np.uint64(64) - (size << np.uint64(3)))
            second = np.uint64(0)
        else:
            second &= ALL_ONES >> (np.uint64(128) - (size << np.uint64(3)))
    else:
        first = load_word(address) if length >= 8 else partial_word(address, length)
        second = partial_word(address + 8, length - 8) if length > 8 else np.uint64(0)
    return first, second | size << TOP_BYTE


@helper
def long_hash(address: int, length: int) -> np.uint64:
    """First key word of a piece above 15 bytes: a hash of its bytes and length."""
    state = np.uint64(length)
    words = length >> 3
    for index in range(words):
        state = mix(state, load_word(address + 8 * index))
    return mix(state, partial_word(address + 8 * words, length & 7))


@helper
def find_short(table: Table, first: np.uint64, second: np.uint64) -> int:
    """Address of the entry of a short piece, or of the empty entry where it belongs."""
    mask = np.uint64(table.mask)
    slot = mix(first, second) & mask
    while True:
        entry = table.entries + signed(slot << ENTRY_SHIFT)
        found = load_word(entry + 8)
        if (found == second and load_word(entry) == first) or found == np.uint64(0):
            return entry
        slot = (slot + np.uint64(1)) & mask


@helper
def find_long(table: Table, first: np.uint64, address: int, length: int) -> int:
    """The same for a piece above 15 bytes, given its hash: the bytes decide."""
    mask = np.uint64(table.mask)
    slot = mix(first, np.uint64(0)) & mask
    while True:
        entry = table.entries + signed(slot << ENTRY_SHIFT)
        found = load_word(entry + 8)
        if found == np.uint64(0):
            return entry
        if load_word(entry) == first and found >> TOP_BYTE == np.uint64(LONG_TAG):
            kept = table.kept_bytes + signed(found & OFFSET_MASK)
            if signed(load_word(kept)) == length and same_bytes(kept + 8, address, length):
                return entry
        slot = (slot + np.uint64(1)) & mask


@helper
def same_bytes(one: int, other: int, length: int) -> bool:
    """Whether length bytes at two addresses are equal."""
    words = length >> 3
    for index in range(words):
        if load_word(one + 8 * index) != load_word(other + 8 * index):
            return False
    for index in range(8 * words, length):  # noqa: SIM110  numba knows no generators
        if load_byte(one + index) != load_byte(other + index):
            return False
    return True


@helper
def used(table: Table, which: int) -> int:
    """Entries, spilled ids or kept bytes in use."""
    return get_64(table.used, which)


@helper
def use(table: Table, which: int, more: int) -> None:
    """Count more of them in use."""
    put_64(table.used, which, used(table, which) + more)


@helper
def keep_bytes(table: Table, address: int, length: int) -> np.uint64:
    """Copy a piece to the kept bytes, which have room; returns the second key word of its entry."""
    offset = used(table, KEPT_BYTES)
    kept = table.kept_bytes + offset
    store_word(kept, np.uint64(length))
    for index in range(length):
        store_byte(kept + 8 + index, np.uint64(load_byte(address + index)))
    use(table, KEPT_BYTES, 8 + length)
    return np.uint64(LONG_TAG) << TOP_BYTE | np.uint64(offset)


# --- merging ---------------------------------------------------------------------------------------------------------


@helper
def pair_value(merges: Merges, left: int, right: int) -> np.uint64:
    """rank << 32 | id of a pair, all ones where the vocabulary does not merge it."""
    mask = np.uint64(merges.mask)
    key = np.uint64(left) << HALF | np.uint64(right)
    slot = mix(key, np.uint64(0)) & mask
    while True:
        found = load_word(merges.keys + signed(slot << WORD_SHIFT))
        if found == key:
            return load_word(merges.values + signed(slot << WORD_SHIFT))
        if found == ALL_ONES:
            return ALL_ONES
        slot = (slot + np.uint64(1)) & mask


@kernel
def build_merges(pairs: npt.NDArray[np.uint32], ids: npt.NDArray[np.uint32], merges: Merges) -> None:
    """Enter (left, right) -> (rank, id) for every row of pairs; the keys are all ones before."""
    mask = np.uint64(merges.mask)
    for rank in range(len(pairs)):
        key = np.uint64(pairs[rank, 0]) << HALF | np.uint64(pairs[rank, 1])
        slot = mix(key, np.uint64(0)) & mask
        while load_word(merges.keys + signed(slot << WORD_SHIFT)) != ALL_ONES:
            slot = (slot + np.uint64(1)) & mask
        store_word(merges.keys + signed(slot << WORD_SHIFT), key)
        store_word(merges.values + signed(slot << WORD_SHIFT), np.uint64(rank) << HALF | np.uint64(ids[rank]))


@helper
def merge_short(address: int, length: int, encoder: Encoder) -> int:
    """Ids of a piece of at most HEAP_BYTES into encoder.ids; returns how many. O(length^2), the lowest rank first."""
    merges, ids, pairs = encoder.merges, encoder.ids, encoder.pairs
    for index in range(length):
        put_32(ids, index, get_32(merges.byte_ids, load_byte(address + index)))
    for index in range(length - 1):
        store_word(pairs + 8 * index, pair_value(merges, get_32(ids, index), get_32(ids, index + 1)))
    count = length
    while count > 1:
        best, least = 0, ALL_ONES
        for index in range(count - 1):
            value = load_word(pairs + 8 * index)
            if value < least:
                best, least = index, value
        if least == ALL_ONES:
            break
        put_32(ids, best, signed(least & LOW_HALF))
        count -= 1
        for index in range(best + 1, count):
            put_32(ids, index, get_32(ids, index + 1))
            store_word(pairs + 8 * index - 8, load_word(pairs + 8 * index))
        for index in range(max(best - 1, 0), min(best + 1, count - 1)):
            store_word(pairs + 8 * index, pair_value(merges, get_32(ids, index), get_32(ids, index + 1)))
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
        pairs[node] = ALL_ONES
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
        pairs[gone] = ALL_ONES
        pairs[node] = ALL_ONES
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
    if value == ALL_ONES:
        return size
    return heap_push(heap, size, value >> HALF << RANK_SHIFT | np.uint64(node))


# --- encoding --------------------------------------------------------------------------------------------------------


@kernel
def encode_documents(
    text: int,
    offsets: npt.NDArray[np.int64],
    encoder: Encoder,
    cursor: npt.NDArray[np.int64],
    output: tuple[int, int],
    id_offsets: npt.NDArray[np.int64],
) -> int:
    """Encode documents from the cursor on; returns 0 when done, else the room (in ids) that it needs to go on.

    text: address of the buffer whose bytes offsets[i]:offsets[i + 1] are document i. output: address and room in ids;
    16 bytes behind the room may be written. id_offsets (documents + 1,) is filled.
    """
    address, room = output
    readable_end = text + offsets[-1]
    document, position, written = cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN]
    while document < offsets.size - 1:
        end = offsets[document + 1]
        while position < end:
            count = scan(text, position, end, encoder.classes, encoder.ends, CHUNK_PIECES)
            stop = get_64(encoder.ends, count - 1)
            if room - written < stop - position:
                cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
                return stop - position
            target = address + (written << encoder.id_shift)
            target = encode_pieces(text, position, count, readable_end, encoder, target)
            written = (target - address) >> encoder.id_shift
            position = stop
        document += 1
        id_offsets[document] = written
    cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
    return 0


@helper
def encode_pieces(text: int, position: int, count: int, readable_end: int, encoder: Encoder, target: int) -> int:
    """Write the ids of the count pieces from position on to the target address; returns the address behind them."""
    table = encoder.table
    start = text + position
    for piece in range(count):
        stop = text + get_64(encoder.ends, piece)
        length = stop - start
        if length <= SHORT_BYTES:
            first, second = short_key(start, length, readable_end)
            entry = find_short(table, first, second)
        elif length <= MAX_CACHED_BYTES:
            first, second = long_hash(start, length), np.uint64(0)
            entry = find_long(table, first, start, length)
        else:
            first, second, entry = np.uint64(0), np.uint64(0), 0
        if entry == 0 or load_word(entry + 8) == np.uint64(0):
            target = encode_new(start, length, first, second, encoder, target)
        else:
            target = write_payload(load_word(entry + 16), load_word(entry + 24), encoder, target)
        start = stop
    return target


@helper
def write_payload(low: np.uint64, high: np.uint64, encoder: Encoder, target: int) -> int:
    """Write the ids of an entry (see enter_payload); returns the address behind them. 16 bytes are written whatever the
    number of ids: the next piece overwrites the surplus."""
    count = signed(high >> HALF)
    if count > 0:
        store_word(target, low)
        store_word(target + 8, high)
        return target + (count << encoder.id_shift)
    return write_ids(encoder.table.spilled + 4 * signed(low), signed(high), target, encoder.id_shift)


@helper
def write_ids(ids: int, count: int, target: int, id_shift: int) -> int:
    """Copy uint32 ids as uint16 or uint32; returns the address behind them."""
    for index in range(count):
        if id_shift == 1:
            store_16(target, np.uint64(get_32(ids, index)))
        else:
            store_32(target, np.uint64(get_32(ids, index)))
        target += 1 << id_shift
    return target


@helper
def encode_new(start: int, length: int, first: np.uint64, second: np.uint64, encoder: Encoder, target: int) -> int:
    """Merge a piece that is not in the table and write its ids; enter it if it is short enough to come again."""
    if length <= HEAP_BYTES:
        count = merge_short(start, length, encoder)
        enter(start, length, first, second, encoder.ids, count, encoder)
        return write_ids(encoder.ids, count, target, encoder.id_shift)
    ids = np.empty(length, np.uint32)
    count = merge_long(start, length, encoder.merges, ids)
    if length <= MAX_CACHED_BYTES:
        enter(start, length, first, second, ids.ctypes.data, count, encoder)
    return write_ids(ids.ctypes.data, count, target, encoder.id_shift)


@helper
def enter(start: int, length: int, first: np.uint64, second: np.uint64, ids: int, count: int, encoder: Encoder) -> None:
    """Enter a piece and its ids into the table; a table that is 0.6 full, or has no room for it, is emptied first."""
    table = encoder.table
    if (
        used(table, ENTRIES) * 5 >= (table.mask + 1) * 3
        or used(table, SPILLED) + count > table.spilled_room
        or used(table, KEPT_BYTES) + length + 8 > table.kept_room
    ):
        for word in range((table.mask + 1) * ENTRY_WORDS):
            store_word(table.entries + 8 * word, np.uint64(0))
        for which in range(3):
            put_64(table.used, which, 0)
    if length <= SHORT_BYTES:
        entry = find_short(table, first, second)
    else:
        entry = find_long(table, first, start, length)
        second = keep_bytes(table, start, length)
    store_word(entry, first)
    store_word(entry + 8, second)
    enter_payload(entry, ids, count, encoder)
    use(table, ENTRIES, 1)


@helper
def enter_payload(entry: int, ids: int, count: int, encoder: Encoder) -> None:
    """Fill the two payload words: up to 4 ids of 16 bits, or 3 of 32, as they go to the output, and their number on
    top of the second word; or 0 there, below it their number, and in the first word where in table.spilled they are."""
    low, high = np.uint64(0), np.uint64(count) << HALF
    if encoder.id_shift == 1 and count <= 4:
        for place in range(count):
            low |= np.uint64(get_32(ids, place)) << np.uint64(16 * place)
    elif encoder.id_shift == 2 and count <= 3:
        for place in range(min(count, 2)):
            low |= np.uint64(get_32(ids, place)) << np.uint64(32 * place)
        if count == 3:
            high |= np.uint64(get_32(ids, 2))
    else:
        offset = used(encoder.table, SPILLED)
        write_ids(ids, count, encoder.table.spilled + 4 * offset, 2)
        use(encoder.table, SPILLED, count)
        low, high = np.uint64(offset), np.uint64(count)
    store_word(entry + 16, low)
    store_word(entry + 24, high)
