"""The numba loops of encoding: split the text, look every pretoken up in the cache, merge its bytes if it is new.

    text --scan--> ends of pretokens --address_batch--> keys, prefetched entries --find--> ids --> output
                   1,024 at a time                   128 at a time                |
                                                                          new: merge, enter

``split_gpt2.py`` and ``split_cl100k.py`` split, ``hash_table.py`` looks up, ``merge_short.py`` and ``merge_long.py``
merge; here they are put together. Almost every pretoken of real text has been seen before, so the speed of
``write_known`` decides.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.hash_table import (
    BATCH_PRETOKENS,
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
from pipeline.tokenizer.kernels.memory import (
    BLOCK_BYTES,
    ONE,
    apart,
    get_32,
    get_64,
    load_byte,
    load_word,
    signed,
    store_16,
    store_32,
    store_word,
    trailing_zeros,
)
from pipeline.tokenizer.kernels.merge_long import merge_long
from pipeline.tokenizer.kernels.merge_short import (
    NOTHING,
    Merges,
    end_of_part,
    ends_of_parts,
    is_character,
    merge_short,
    tokens_of_character,
    tokens_of_two,
)
from pipeline.tokenizer.kernels.split_cl100k import scan_cl100k
from pipeline.tokenizer.kernels.split_gpt2 import Scanner, scan_gpt2

GPT2, CL100K = 0, 1  # patterns
MAX_PRETOKENS = 1024  # split before they are looked up: their ends stay in the L1 cache
MOST_PRETOKENS = MAX_PRETOKENS + BLOCK_BYTES  # that a scan may find
MAX_CACHED_BYTES = 256  # longer pretokens hardly ever come twice
MOST_CACHED_BYTES = MOST_PRETOKENS * (MAX_CACHED_BYTES + 8)  # that the pretokens of a scan may take
TABLE_IS_FULL = -1
THIRD = np.uint64(4)  # bit
LOW_HALF = np.uint64(0xFFFFFFFF)
INLINE_BYTES = 12  # of ids in an entry's payload; below the count

DOCUMENT, POSITION, WRITTEN = 0, 1, 2  # indices of a cursor


class Encoder(NamedTuple):
    """The arguments of encoding except the text: addresses and numbers. The last three are working memory."""

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
    """Write the ends of the pretokens from position < end on to scanner.ends; returns how many (see scan_gpt2)."""
    if pattern == CL100K:
        return scan_cl100k(text, position, end, scanner)
    return scan_gpt2(text, position, end, readable_end, scanner)


@kernel
def pretokenize(text: int, size: int, pattern: int, scanner: Scanner, ends: npt.NDArray[np.int64]) -> int:
    """Write the ends of all pretokens of size bytes of text to ends (size,); returns how many."""
    position = 0
    count = 0
    while position < size:
        found = scan(text, position, size, text + size, pattern, scanner)
        for pretoken in range(found):
            ends[count + pretoken] = get_64(scanner.ends, pretoken)
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
    """Encode documents from the cursor on.

    Returns 0 when done, else the room (in ids) that it needs to continue, or TABLE_IS_FULL if it needs a table with
    MOST_PRETOKENS entries and MOST_CACHED_BYTES free.

    text: address of the buffer whose bytes starts[i]:stops[i] are document i; the last stop is its end. output: address
    and room in ids; 16 bytes after the room may be written. id_offsets (documents + 1,) is filled from index 1 on.
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
                pretokens = min(count, BATCH_PRETOKENS)
                target = encode_batch(text, position, ends, pretokens, readable_end, encoder, target)
                position = get_64(ends, pretokens - 1)
                ends += 8 * pretokens
                count -= pretokens
            written = (target - address) >> encoder.id_shift
        document += 1
        position = -1
        id_offsets[document] = written
    cursor[DOCUMENT], cursor[POSITION], cursor[WRITTEN] = document, position, written
    return 0


@inlined
def encode_batch(text: int, start: int, ends: int, count: int, readable_end: int, encoder: Encoder, target: int) -> int:
    """Write the ids of count pretokens from position start on to the target address; returns the address after them."""
    address_batch(text, start, ends, count, readable_end, encoder.table, encoder.batch)
    pretoken = 0
    while True:
        pretoken, target = write_known(encoder.batch, pretoken, count, encoder.id_shift, target)
        if pretoken == count:
            return target
        address = text + (get_64(ends, pretoken - 1) if pretoken > 0 else start)
        length = text + get_64(ends, pretoken) - address
        target = encode_rare(address, length, encoder.batch + 24 * pretoken, encoder, target)
        pretoken += 1


@helper
def write_known(batch: int, pretoken: int, count: int, id_shift: int, target: int) -> tuple[int, int]:
    """Write the ids of the pretokens of a batch from the given one on, up to the first that is not in its home entry.

    Returns that pretoken, or count, and the address after the ids.
    """
    apart()
    while pretoken < count:
        key = batch + 24 * pretoken
        entry = get_64(key, 2)
        high = load_word(entry + 24)
        if not holds(entry, key) or high >> HALF == EMPTY:
            break
        store_word(target, load_word(entry + 16))
        store_word(target + 8, high)
        target += signed(high >> HALF) << id_shift
        pretoken += 1
    return pretoken, target


@inlined
def write_id(token_id: int, target: int, id_shift: int) -> None:
    """Write an id as uint16 or uint32."""
    if id_shift == 1:
        store_16(target, np.uint64(token_id))
    else:
        store_32(target, np.uint64(token_id))


@helper
def write_ids(ids: int, count: int, target: int, id_shift: int) -> int:
    """Copy uint32 ids as uint16 or uint32; returns the address after them."""
    for index in range(count):
        write_id(get_32(ids, index), target, id_shift)
        target += 1 << id_shift
    return target


@inlined
def copy_ids(source: int, num_bytes: int, target: int) -> None:
    """Copy ids, and up to 7 bytes after them."""
    for offset in range(0, num_bytes, 8):
        store_word(target + offset, load_word(source + offset))


@inlined
def encode_rare(address: int, length: int, key: int, encoder: Encoder, target: int) -> int:
    """Write the ids of a pretoken that is not in its home entry; returns the address after them."""
    table = encoder.table
    first, second, entry = load_word(key), load_word(key + 8), get_64(key, 2)
    if length <= SHORT_BYTES:
        entry = find_short(table, entry, first, second)
        if load_word(entry + 8) == EMPTY:
            count = merge_short(address, length, encoder.merges, encoder.ids, encoder.ranks)
            enter_key(table, entry, first, second, address, length)
            stop = write_ids(encoder.ids, count, target, encoder.id_shift)
            enter_payload(entry, target, stop - target, encoder)
            return stop
    else:
        if length <= MAX_CACHED_BYTES:
            entry = find_long(table, entry, first, address, length)
        if length > MAX_CACHED_BYTES or load_word(entry + 8) == EMPTY:
            stop = encode_long(address, length, encoder, target)
            if length <= MAX_CACHED_BYTES:
                enter_key(table, entry, first, second, address, length)
                enter_payload(entry, target, stop - target, encoder)
            return stop
    low, high = load_word(entry + 16), load_word(entry + 24)
    if high >> HALF == EMPTY:
        num_bytes = signed(high) << encoder.id_shift
        copy_ids(table.spilled + 4 * signed(low), num_bytes, target)
        return target + num_bytes
    store_word(target, low)
    store_word(target + 8, high)
    return target + (signed(high >> HALF) << encoder.id_shift)


@inlined
def enter_payload(entry: int, ids: int, num_bytes: int, encoder: Encoder) -> None:
    """Fill the two payload words of an entry.

    Up to 12 bytes of ids are stored as in the output, their number in the upper half of the second word. For more ids
    the upper half is 0, the lower half their number, and the first word is their place in table.spilled.
    """
    count = np.uint64(num_bytes >> encoder.id_shift)
    if num_bytes <= INLINE_BYTES:
        store_word(entry + 16, load_word(ids))
        store_word(entry + 24, load_word(ids + 8) & LOW_HALF | count << HALF)
        return
    offset = used(encoder.table, SPILLED)
    copy_ids(ids, num_bytes, encoder.table.spilled + 4 * offset)
    use(encoder.table, SPILLED, (num_bytes + 7) >> 3 << 1)
    store_word(entry + 16, np.uint64(offset))
    store_word(entry + 24, count)


@helper
def encode_long(address: int, length: int, encoder: Encoder, target: int) -> int:
    """Write the ids of a pretoken above SHORT_BYTES, part by part; returns the address after them."""
    apart()
    merges, id_shift = encoder.merges, encoder.id_shift
    end = address + length
    while address < end:
        ends = ends_of_parts(address, end, merges)
        if ends == NOTHING:
            size = end_of_part(address, end, merges) - address
            target = encode_long_part(address, size, encoder, target, np.empty(size, np.uint32))
            address += size
        while ends != NOTHING:
            if ends & THIRD != NOTHING and is_character(address):
                size = 3
                first, second, third, count = tokens_of_character(address, merges)
                write_id(first, target, id_shift)
                write_id(second, target + (1 << id_shift), id_shift)
                write_id(third, target + (2 << id_shift), id_shift)
                target += count << id_shift
            else:
                size = trailing_zeros(ends) + 1
                target = encode_part(address, size, end, encoder, target)
            address += size
            ends = ends >> np.uint64(size - 1) >> ONE
    return target


@inlined
def encode_part(address: int, size: int, end: int, encoder: Encoder, target: int) -> int:
    """Write the ids of a part of up to 64 bytes of a pretoken that ends at end; returns the address after them."""
    merges, id_shift = encoder.merges, encoder.id_shift
    if size > 2:
        count = merge_short(address, size, merges, encoder.ids, encoder.ranks)
        return write_ids(encoder.ids, count, target, id_shift)
    if address + 1 == end:  # one byte, and nothing after it that could be read
        write_id(get_32(merges.byte_ids, load_byte(address)), target, id_shift)
        return target + (1 << id_shift)
    first, second, is_merged = tokens_of_two(address, merges)
    write_id(first, target, id_shift)
    write_id(second, target + (1 << id_shift), id_shift)
    return target + ((1 if is_merged else size) << id_shift)


@helper
def encode_long_part(address: int, length: int, encoder: Encoder, target: int, array: npt.NDArray[np.uint32]) -> int:
    """encode_long for a part of any length; array (length,) is working memory."""
    ids = array.ctypes.data
    return write_ids(ids, merge_long(address, length, encoder.merges, ids), target, encoder.id_shift)
