"""The hash table of pretokens seen before, for encoding and for counting: open addressing, linear probing.

An entry is 32 bytes, half a cache line, so that a probe costs one memory access:

    word 0, 1   key: a pretoken of up to 15 bytes itself, padded with zeros, its length in the top byte; for a longer
                pretoken a hash, and 16 in the top byte, above the place in ``kept_bytes`` where its bytes are
    word 2, 3   payload: the pretoken's ids (encode.py) or its count (count.py)

An empty entry has 0 in word 1. A batch of pretokens is looked up in two passes: ``address_batch`` makes the keys and
prefetches the entries, which have arrived when the second pass compares them. The table is larger than the caches, and
waiting for one cache line at a time would take most of the time.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.memory import (
    apart,
    get_64,
    load_byte,
    load_word,
    prefetch,
    put_64,
    signed,
    store_word,
)

SHORT_BYTES = 15  # longest pretoken that is its own key
ENTRY_BYTES = 32
ENTRY_SHIFT = np.uint64(5)
LONG_TAG = 16  # top byte of word 1; 1..15 there is the length of a short pretoken
BATCH_PRETOKENS = 128
BATCH_WORDS = 3 * BATCH_PRETOKENS  # of every pretoken: two words of key, address of the entry

MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)
OFFSET_MASK = np.uint64(0x00FFFFFFFFFFFFFF)
LONG_KEY = np.uint64(LONG_TAG << 56 | 0x00FFFFFFFFFFFFFF)  # stands for word 1 before the place is known; never stored
EMPTY = np.uint64(0)
HALF = np.uint64(32)
TOP_BYTE = np.uint64(56)

ENTRIES, SPILLED, KEPT_BYTES = 0, 1, 2  # indices of Table.used


class Table(NamedTuple):
    """All members are addresses or numbers."""

    entries: int  # ENTRY_BYTES x slots, a power of two; all zero at first
    entries_end: int
    shift: int  # 64 - log2(slots): the top bits of a hash are its slot
    most_entries: int  # in use at a time; linear probing needs empty ones
    key_masks: int  # uint64 of 32: see key_masks()
    kept_bytes: int  # uint8: for every long pretoken its length in 8 bytes, then the pretoken
    kept_room: int  # its size
    spilled: int  # ids of pretokens that have more than fit into an entry, in units of 4 bytes
    spilled_room: int  # its size in units
    used: int  # int64 of 3: entries, spilled, kept_bytes in use


def key_masks() -> list[int]:
    """Two words for every length up to 15: masks that keep the bytes of a pretoken among the 16 from its start."""
    words: list[int] = []
    for length in range(SHORT_BYTES + 1):
        bits = (1 << 8 * length) - 1
        words += [bits & 0xFFFFFFFFFFFFFFFF, bits >> 64]
    return words


@inlined
def mix(first: np.uint64, second: np.uint64) -> np.uint64:
    """Hash of two words, best in its top bits."""
    mixed = first ^ (second * MULTIPLIER_1)
    return (mixed ^ (mixed >> HALF)) * MULTIPLIER_2


@inlined
def home(table: Table, first: np.uint64, second: np.uint64) -> int:
    """Address of the entry that is probed first for a key; for a long pretoken second is ignored."""
    return table.entries + signed(mix(first, second) >> np.uint64(table.shift) << ENTRY_SHIFT)


@inlined
def next_entry(table: Table, entry: int) -> int:
    """Address of the entry to probe next."""
    entry += ENTRY_BYTES
    return table.entries if entry == table.entries_end else entry


@helper
def partial_word(address: int, length: int) -> np.uint64:
    """The length < 8 bytes at the address as a word, read one by one."""
    word = np.uint64(0)
    for index in range(length):
        word |= np.uint64(load_byte(address + index)) << np.uint64(8 * index)
    return word


@helper
def short_key_at_the_end(address: int, length: int) -> tuple[np.uint64, np.uint64]:
    """The bytes of a short pretoken as two words, where 16 bytes cannot be read."""
    first = load_word(address) if length >= 8 else partial_word(address, length)
    second = partial_word(address + 8, length - 8) if length > 8 else np.uint64(0)
    return first, second


@helper
def long_hash(address: int, length: int) -> np.uint64:
    """Word 0 of a long pretoken: a hash of its bytes and length."""
    state = np.uint64(length)
    for index in range(0, length - 7, 8):
        state = mix(state, load_word(address + index))
        state ^= state >> HALF
    state = mix(state, load_word(address + length - 8))  # the last 8 bytes, some of them again
    return state ^ state >> HALF


@helper
def address_batch(text: int, start: int, ends: int, count: int, readable_end: int, table: Table, batch: int) -> None:
    """First pass: keys and home entries of count pretokens, which begin at position start and end where ends says, into
    the batch. Pretokens of a kind that is not looked up get their key all the same."""
    apart()
    address = text + start
    for pretoken in range(count):
        stop = text + get_64(ends, pretoken)
        length = stop - address
        if length > SHORT_BYTES:
            first, second = long_hash(address, length), LONG_KEY
            entry = home(table, first, EMPTY)
        else:
            if address + 16 <= readable_end:
                first = load_word(address) & load_word(table.key_masks + 16 * length)
                second = load_word(address + 8) & load_word(table.key_masks + 16 * length + 8)
            else:
                first, second = short_key_at_the_end(address, length)
            second |= np.uint64(length) << TOP_BYTE
            entry = home(table, first, second)
        prefetch(entry)
        store_word(batch + 24 * pretoken, first)
        store_word(batch + 24 * pretoken + 8, second)
        put_64(batch + 24 * pretoken + 16, 0, entry)
        address = stop


@inlined
def find_short(table: Table, entry: int, first: np.uint64, second: np.uint64) -> int:
    """Address of the entry of a short pretoken, or of the empty entry where it belongs; the search begins at entry."""
    while True:
        found = load_word(entry + 8)
        if (found == second and load_word(entry) == first) or found == EMPTY:
            return entry
        entry = next_entry(table, entry)


@helper
def find_long(table: Table, entry: int, first: np.uint64, address: int, length: int) -> int:
    """The same for a long pretoken, given its hash: the bytes decide."""
    while True:
        found = load_word(entry + 8)
        if found == EMPTY:
            return entry
        if load_word(entry) == first and found >> TOP_BYTE == np.uint64(LONG_TAG):
            kept = table.kept_bytes + signed(found & OFFSET_MASK)
            if signed(load_word(kept)) == length and same_bytes(kept + 8, address, length):
                return entry
        entry = next_entry(table, entry)


@helper
def same_bytes(one: int, other: int, length: int) -> bool:
    """Whether length bytes at two addresses, 8 at least, are equal."""
    for index in range(0, length - 7, 8):
        if load_word(one + index) != load_word(other + index):
            return False
    return load_word(one + length - 8) == load_word(other + length - 8)


@inlined
def holds(entry: int, key: int) -> bool:
    """Whether an entry has the key, two words of a batch; a single comparison, as the answer is nearly always yes."""
    return (load_word(entry) ^ load_word(key)) | (load_word(entry + 8) ^ load_word(key + 8)) == EMPTY


@inlined
def used(table: Table, which: int) -> int:
    """Entries, spilled ids or kept bytes in use."""
    return get_64(table.used, which)


@inlined
def use(table: Table, which: int, more: int) -> None:
    """Add to the number in use."""
    put_64(table.used, which, used(table, which) + more)


@inlined
def has_room(table: Table, entries: int, kept_bytes: int, spilled: int) -> bool:
    """Whether so many more of each fit."""
    return (
        used(table, ENTRIES) + entries <= table.most_entries
        and used(table, KEPT_BYTES) + kept_bytes <= table.kept_room
        and used(table, SPILLED) + spilled <= table.spilled_room
    )


@helper
def enter_key(table: Table, entry: int, first: np.uint64, second: np.uint64, address: int, length: int) -> None:
    """Fill the key of an empty entry; for a long pretoken there must be room in kept_bytes."""
    if length > SHORT_BYTES:
        offset = used(table, KEPT_BYTES)
        kept = table.kept_bytes + offset
        store_word(kept, np.uint64(length))
        for index in range(0, length - 7, 8):
            store_word(kept + 8 + index, load_word(address + index))
        store_word(kept + length, load_word(address + length - 8))  # the last 8 bytes, some of them again
        use(table, KEPT_BYTES, 8 + length)
        second = np.uint64(LONG_TAG) << TOP_BYTE | np.uint64(offset)
    store_word(entry, first)
    store_word(entry + 8, second)
    use(table, ENTRIES, 1)


@kernel
def rehash(old: Table, new: Table) -> None:
    """Enter all entries of a table into a larger, empty one; kept bytes and spilled ids stay where they are."""
    for source in range(old.entries, old.entries_end, ENTRY_BYTES):
        second = load_word(source + 8)
        if second == EMPTY:
            continue
        is_long = second >> TOP_BYTE == np.uint64(LONG_TAG)
        target = home(new, load_word(source), EMPTY if is_long else second)
        while load_word(target + 8) != EMPTY:
            target = next_entry(new, target)
        for word in range(0, ENTRY_BYTES, 8):
            store_word(target + word, load_word(source + word))
