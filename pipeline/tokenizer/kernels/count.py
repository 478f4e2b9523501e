"""The numba loops that count the pretokens of a text, in the table that encoding uses (hash_table.py)."""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.encode import DOCUMENT, POSITION, scan
from pipeline.tokenizer.kernels.hash_table import (
    BATCH_PRETOKENS,
    EMPTY,
    ENTRY_BYTES,
    KEPT_BYTES,
    LONG_TAG,
    OFFSET_MASK,
    SHORT_BYTES,
    TOP_BYTE,
    Table,
    address_batch,
    enter_key,
    find_long,
    find_short,
    has_room,
    holds,
    used,
)
from pipeline.tokenizer.kernels.memory import get_64, load_byte, load_word, signed, store_word
from pipeline.tokenizer.kernels.split_gpt2 import Scanner


class Counter(NamedTuple):
    """The arguments of counting except the text."""

    pattern: int  # encode.GPT2 or CL100K
    scanner: Scanner
    table: Table  # word 2 of an entry is the count of its pretoken
    batch: int  # uint64 of BATCH_WORDS


@kernel
def count_documents(
    text: int,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    counter: Counter,
    cursor: npt.NDArray[np.int64],
) -> int:
    """Count pretokens from the cursor on (text, starts, stops as in encode.encode_documents).

    Returns 0 when done, else how many kept bytes must be free to continue; the table must then also have room for
    MOST_PRETOKENS entries, as many as one scan may find.
    """
    table, ends = counter.table, counter.scanner.ends
    readable_end = text + stops[-1]
    document, position = cursor[DOCUMENT], cursor[POSITION]
    while document < stops.size:
        end = stops[document]
        if position < 0:
            position = starts[document]
        while position < end:
            count = scan(text, position, end, readable_end, counter.pattern, counter.scanner)
            kept_bytes = get_64(ends, count - 1) - position + 8 * count
            if not has_room(table, count, kept_bytes, 0):
                cursor[DOCUMENT], cursor[POSITION] = document, position
                return kept_bytes
            for first in range(0, count, BATCH_PRETOKENS):
                pretokens = min(count - first, BATCH_PRETOKENS)
                count_batch(text, position, ends + 8 * first, pretokens, readable_end, counter)
                position = get_64(ends, first + pretokens - 1)
        document += 1
        position = -1
    cursor[DOCUMENT], cursor[POSITION] = document, position
    return 0


@inlined
def count_batch(text: int, start: int, ends: int, count: int, readable_end: int, counter: Counter) -> None:
    """Add one to the counts of count pretokens from position start on."""
    table = counter.table
    address_batch(text, start, ends, count, readable_end, table, counter.batch)
    address = text + start
    for pretoken in range(count):
        stop = text + get_64(ends, pretoken)
        key = counter.batch + 24 * pretoken
        entry = get_64(key, 2)
        if not holds(entry, key):
            entry = find_or_enter(address, stop - address, key, table)
        store_word(entry + 16, load_word(entry + 16) + np.uint64(1))
        address = stop


@helper
def find_or_enter(address: int, length: int, key: int, table: Table) -> int:
    """Address of the entry of a pretoken, which is not the first one probed; it is entered if it is new."""
    first, second, entry = load_word(key), load_word(key + 8), get_64(key, 2)
    if length <= SHORT_BYTES:
        entry = find_short(table, entry, first, second)
    else:
        entry = find_long(table, entry, first, address, length)
    if load_word(entry + 8) == EMPTY:
        enter_key(table, entry, first, second, address, length)
    return entry


@kernel
def list_pretokens(
    table: Table, content: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> None:
    """Write the pretokens of a counting table: concatenated bytes, offsets (pretokens + 1,), counts (pretokens,)."""
    pretoken = 0
    end = 0
    for entry in range(table.entries, table.entries_end, ENTRY_BYTES):
        second = load_word(entry + 8)
        if second == EMPTY:
            continue
        length = signed(second >> TOP_BYTE)
        source = entry
        if length == LONG_TAG:
            kept = table.kept_bytes + signed(second & OFFSET_MASK)
            length = signed(load_word(kept))
            source = kept + 8
        for index in range(length):
            content[end + index] = load_byte(source + index)
        end += length
        pretoken += 1
        offsets[pretoken] = end
        counts[pretoken - 1] = signed(load_word(entry + 16))


@kernel
def content_bytes(table: Table) -> int:
    """Bytes of all pretokens of a table together."""
    total = used(table, KEPT_BYTES)
    for entry in range(table.entries, table.entries_end, ENTRY_BYTES):
        length = signed(load_word(entry + 8) >> TOP_BYTE)
        total += -8 if length == LONG_TAG else length
    return total
