"""The numba loops of encoding: cut the text, look every piece up among those seen before, merge its bytes if it is new.

    text --scan--> ends of pieces --address_batch--> keys, entries on their way --find--> ids --> output
                   1,024 at a time                   128 at a time                |
                                                                          new: merge, enter

``bpe_scan_kernels.py`` and ``bpe_cl100k_kernels.py`` cut, ``bpe_table_kernels.py`` looks up, ``bpe_merge_kernels.py``
merges; here they are put together. Almost every piece of real text has been seen before: what counts is the way through
``encode_batch`` that makes no detour.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.bpe_cl100k_kernels import scan_cl100k
from pipeline.bpe_memory_kernels import BLOCK_BYTES, get_32, get_64, load_word, signed, store_16, store_32, store_word
from pipeline.bpe_merge_kernels import Merges, merge_parts, merge_short
from pipeline.bpe_scan_kernels import Scanner, scan_gpt2
from pipeline.bpe_table_kernels import (
    BATCH_PIECES,
    EMPTY,
    HALF,
    SHORT_BYTES,
    SPILLED,
    Table,
    address_batch,
    enter_key,
    find_long,
    find_short,
    has_room,
    holds,
    use,
    used,
)
from pipeline.kernel_cache import helper, inlined, kernel

GPT2, CL100K = 0, 1  # patterns
MAX_PIECES = 1024  # found before they are looked up: their ends stay in the L1 cache
MOST_PIECES = MAX_PIECES + BLOCK_BYTES  # that a scan may find
MAX_CACHED_BYTES = 256  # longer pieces hardly ever come twice
MOST_CACHED_BYTES = MOST_PIECES * (MAX_CACHED_BYTES + 8)  # that the pieces of a scan may take
TABLE_IS_FULL = -1
INLINE_BYTES = 12  # of ids in an entry's payload; below the count

DOCUMENT, POSITION, WRITTEN = 0, 1, 2  # indices of a cursor


class Encoder(NamedTuple):
    """All that encoding takes but the text. Addresses and numbers; the last three are working space."""

    pattern: int  # GPT2 or CL100K
    scanner: Scanner
    merges: Merges
    table: Table
    id_shift: int  # log2 of the bytes of an id: 1 or 2
    prefix: int  # id in front of every document, -1 for none
    batch: int  # uint64 of BATCH_WORDS
    ids: int  # uint32 of SHORT_MERGE_BYTES
    ranks: int  # uint32 of SHORT_MERGE_BYTES


@helper
def scan(text: int, position: int, end: int, readable_end: int, pattern: int, scanner: Scanner) -> int:
    """Write the ends of the pieces from position < end on to scanner.ends; returns how many (see scan_gpt2)."""
    if pattern == CL100K:
        return scan_cl100k(text, position, end, scanner)
    return scan_gpt2(text, position, end, readable_end, scanner)


@kernel
def cut(text: int, size: int, pattern: int, scanner: Scanner, ends: npt.NDArray[np.int64]) -> int:
    """Write the ends of all pieces of size bytes of text to ends (size,); returns how many."""
    position = 0
    count = 0
    while position < size:
        found = scan(text, position, size, text + size, pattern, scanner)
        for piece in range(found):
            ends[count + piece] = get_64(scanner.ends, piece)
        count += found
        position = get_64(scanner.ends, found - 1)
    return count


@kernel
def encode_documents(
    text: int,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    encoder: Encoder,
    cursor: npt.NDArray[np.int64],
    output: tuple[int, int],
    id_offsets: npt.NDArray[np.int64],
) -> int:
    """Encode documents from the cursor on; returns 0 when done, else the room (in ids) that it needs to go on, or
    TABLE_IS_FULL if it needs a table that has MOST_PIECES entries and MOST_CACHED_BYTES free.

    text: address of the buffer whose bytes starts[i]:stops[i] are document i; the last stop is its end. output: address
    and room in ids; 16 bytes behind the room may be written. id_offsets (documents + 1,) is filled from index 1 on.
    """
    address, room = output
    readable_end = text + stops[-1]
    document, position, written = cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN]
    while document < stops.size:
        end = stops[document]
        if position < 0:  # a document begins
            if room <= written:
                cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
                return 1 + end - starts[document]
            position = starts[document]
            if encoder.prefix >= 0:
                write_id(encoder.prefix, address + (written << encoder.id_shift), encoder.id_shift)
                written += 1
        while position < end:
            count = scan(text, position, end, readable_end, encoder.pattern, encoder.scanner)
            stop = get_64(encoder.scanner.ends, count - 1)
            if room - written < stop - position:
                cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
                return stop - position
            cached_bytes = min(stop - position + 8 * count, MOST_CACHED_BYTES)
            if not has_room(encoder.table, count, cached_bytes, cached_bytes):
                cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
                return TABLE_IS_FULL
            target = address + (written << encoder.id_shift)
            ends = encoder.scanner.ends
            while count > 0:
                pieces = min(count, BATCH_PIECES)
                target = encode_batch(text, position, ends, pieces, readable_end, encoder, target)
                position = get_64(ends, pieces - 1)
                ends += 8 * pieces
                count -= pieces
            written = (target - address) >> encoder.id_shift
        document += 1
        position = -1
        id_offsets[document] = written
    cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
    return 0


@inlined
def encode_batch(text: int, start: int, ends: int, count: int, readable_end: int, encoder: Encoder, target: int) -> int:
    """Write the ids of count pieces from position start on to the target address; returns the address behind them."""
    address_batch(text, start, ends, count, readable_end, encoder.table, encoder.batch)
    address = text + start
    for piece in range(count):
        stop = text + get_64(ends, piece)
        key = encoder.batch + 24 * piece
        entry = get_64(key, 2)
        if holds(entry, key):
            high = load_word(entry + 24)
            store_word(target, load_word(entry + 16))
            store_word(target + 8, high)
            inline = signed(high >> HALF)
            if inline > 0:
                target += inline << encoder.id_shift
            else:
                target = write_spilled(entry, encoder, target)
        else:
            target = encode_rare(address, stop - address, key, encoder, target)
        address = stop
    return target


@inlined
def write_id(token_id: int, target: int, id_shift: int) -> None:
    """Write an id as uint16 or uint32."""
    if id_shift == 1:
        store_16(target, np.uint64(token_id))
    else:
        store_32(target, np.uint64(token_id))


@helper
def write_ids(ids: int, count: int, target: int, id_shift: int) -> int:
    """Copy uint32 ids as uint16 or uint32; returns the address behind them."""
    for index in range(count):
        write_id(get_32(ids, index), target, id_shift)
        target += 1 << id_shift
    return target


@inlined
def write_spilled(entry: int, encoder: Encoder, target: int) -> int:
    """Write the ids of an entry that has too many to hold them; returns the address behind them."""
    ids = encoder.table.spilled + 4 * signed(load_word(entry + 16))
    return write_ids(ids, signed(load_word(entry + 24)), target, encoder.id_shift)


@inlined
def encode_rare(address: int, length: int, key: int, encoder: Encoder, target: int) -> int:
    """Write the ids of a piece whose key is not in the first entry of its search; returns the address behind them."""
    table = encoder.table
    first, second, entry = load_word(key), load_word(key + 8), get_64(key, 2)
    if length <= SHORT_BYTES:
        entry = find_short(table, entry, first, second)
    elif length <= MAX_CACHED_BYTES:
        entry = find_long(table, entry, first, address, length)
    if length > MAX_CACHED_BYTES or load_word(entry + 8) == EMPTY:
        return encode_new(address, length, key, entry, encoder, target)
    high = load_word(entry + 24)
    if high >> HALF == EMPTY:
        return write_spilled(entry, encoder, target)
    store_word(target, load_word(entry + 16))
    store_word(target + 8, high)
    return target + (signed(high >> HALF) << encoder.id_shift)


@inlined
def encode_new(address: int, length: int, key: int, entry: int, encoder: Encoder, target: int) -> int:
    """Merge a piece that is not in the table and write its ids; enter it if it is short enough to come again. entry is
    the empty one where it belongs."""
    if length <= SHORT_BYTES:
        count = merge_short(address, length, encoder.merges, encoder.ids, encoder.ranks)
        enter(address, length, key, entry, encoder.ids, count, encoder)
        return write_ids(encoder.ids, count, target, encoder.id_shift)
    return encode_long(address, length, key, entry, encoder, target, np.empty(length, np.uint32))


@helper
def encode_long(
    address: int, length: int, key: int, entry: int, encoder: Encoder, target: int, array: npt.NDArray[np.uint32]
) -> int:
    """encode_new for a piece above SHORT_BYTES; array (length,) is working space."""
    ids = array.ctypes.data
    count = merge_parts(address, length, encoder.merges, ids, (encoder.ids, encoder.ranks))
    if length <= MAX_CACHED_BYTES:
        enter(address, length, key, entry, ids, count, encoder)
    return write_ids(ids, count, target, encoder.id_shift)


@inlined
def enter(address: int, length: int, key: int, entry: int, ids: int, count: int, encoder: Encoder) -> None:
    """Fill the empty entry of a piece and its ids; there is room."""
    enter_key(encoder.table, entry, load_word(key), load_word(key + 8), address, length)
    enter_payload(entry, ids, count, encoder)


@inlined
def enter_payload(entry: int, ids: int, count: int, encoder: Encoder) -> None:
    """Fill the two payload words: up to 12 bytes of ids as they go to the output, and their number in the upper half of
    the second word; or 0 there, below it their number, and in the first word where in table.spilled they are."""
    if count << encoder.id_shift <= INLINE_BYTES:
        write_ids(ids, count, entry + 16, encoder.id_shift)
        store_32(entry + 28, np.uint64(count))
        return
    offset = used(encoder.table, SPILLED)
    write_ids(ids, count, encoder.table.spilled + 4 * offset, 2)
    use(encoder.table, SPILLED, count)
    store_word(entry + 16, np.uint64(offset))
    store_word(entry + 24, np.uint64(count))
