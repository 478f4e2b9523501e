"""The numba loops that split text into pretokens by GPT-2's pattern, 64 bytes at a time: bytes in, end offsets out.

The pattern, over UTF-8: 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

Every byte gets a kind, that of its character: letter, number, white space, other. A block of 64 bytes becomes one word
per kind, one bit a byte, and where pretokens start is arithmetic on whole words (bit 0 is on the left here):

    text            H e l l o ,   i t ' s     1 9 8 4 ! !
    letters         1 1 1 1 1 0 0 1 1 0 1 0 0 0 0 0 0 0 0
    numbers         0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 0 0
    white           0 0 0 0 0 0 1 0 0 0 0 1 1 0 0 0 0 0 0
    starts          1 0 0 0 0 1 1 0 0 1 0 1 1 0 0 0 0 1 0

1. Where the kind changes, a pretoken starts; but not after a blank (U+0020), which belongs to the next pretoken.
2. The last character of a run of white space starts one, unless the text ends there: ``\\s+(?!\\S)`` gives it back.
3. An apostrophe that starts a pretoken and is followed by s, t, d, m, re, ve or ll: its pretoken is these 2 or 3 bytes.

What a block cannot know (the bit before, the bit after, a character or a contraction that crosses its border) is
carried over, so that blocks are independent of where pretokens lie. After the end of a document everything counts as
white space, which is what rule 2 needs. A byte that is no part of a character (bad UTF-8) is one character of the kind
other. A scan may begin wherever a pretoken ends and gives the same pretokens from there on.

No read goes past the given end. The plain reference is tests/support/bpe_references.py.
"""

# ruff: noqa: PLR0917, PLR1714  numba calls by position, and compiles comparisons better than sets

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.tokenizer.kernels.cache import helper, inlined
from pipeline.tokenizer.kernels.memory import (
    ALL_ONES,
    BLOCK_BYTES,
    ONE,
    TOP_BIT,
    byte_masks,
    load_32,
    load_byte,
    low_bits,
    ones,
    put_64,
    store_byte,
    trailing_zeros,
)

OTHER_KIND, LETTER_KIND, NUMBER_KIND, SPACE_KIND = 0, 1, 2, 3  # as in unicode_table.character_classes
NOTHING = np.uint64(0)
END_SLACK = 8  # ends are written eight at a time


class Scanner(NamedTuple):
    """The arguments of scanning except the text, as addresses."""

    classes: int  # unicode_table.character_classes
    ends: int  # int64 of max_pretokens + BLOCK_BYTES + END_SLACK: where pretokens end
    max_pretokens: int  # of one scan
    block: int  # uint8 of BLOCK_BYTES: a copy of the last bytes of a text


class Block(NamedTuple):
    """64 bytes of text, padded with white space at its end; one bit a byte."""

    letters: np.uint64
    numbers: np.uint64
    white: np.uint64
    blanks: np.uint64
    apostrophes: np.uint64
    white_tails: np.uint64  # bytes of a white-space character but its first
    over: np.uint64  # bytes of the next block that belong to a character of this one
    over_kind: int  # that character's kind


@helper
def character(text: int, position: int, end: int, classes: int) -> int:
    """Kind and width of the character at position < end, as width << 2 | kind; a bad byte is one OTHER."""
    first = load_byte(text + position)
    if first < 0x80:
        return 4 | load_byte(classes + first)
    if first < 0xE0:
        width, code, least = 2, first & 0x1F, 0x80
    elif first < 0xF0:
        width, code, least = 3, first & 0x0F, 0x800
    else:
        width, code, least = 4, first & 0x07, 0x10000
    if first < 0xC2 or first > 0xF4 or position + width > end:
        return 4
    for index in range(1, width):
        byte = load_byte(text + position + index)
        if byte & 0xC0 != 0x80:
            return 4
        code = code << 6 | byte & 0x3F
    if code < least or code > 0x10FFFF or 0xD800 <= code < 0xE000:  # too long, beyond Unicode, a surrogate
        return 4
    return width << 2 | load_byte(classes + code)


@inlined
def wide_character(text: int, position: int, end: int, classes: int) -> int:
    """character() above U+007F, with a fast path for valid characters of two or three bytes, which nearly all are."""
    if position + 4 <= end:
        word = load_32(text + position)  # the first byte is the lowest
        if word & 0xC0E0 == 0x80C0 and word & 0x1E != 0:
            return 8 | load_byte(classes + ((word & 0x1F) << 6 | word >> 8 & 0x3F))
        code = (word & 0x0F) << 12 | (word >> 8 & 0x3F) << 6 | word >> 16 & 0x3F
        if word & 0xC0C0F0 == 0x8080E0 and code >= 0x800 and code & 0xF800 != 0xD800:
            return 12 | load_byte(classes + code)
    return character(text, position, end, classes)


@inlined
def read_block(
    text: int, position: int, end: int, readable_end: int, scanner: Scanner, over: np.uint64, over_kind: int
) -> Block:
    """The block at position; over and over_kind are those of the block before."""
    left = end - position
    if left <= 0:
        return Block(NOTHING, NOTHING, ALL_ONES, NOTHING, NOTHING, NOTHING, NOTHING, OTHER_KIND)
    source = text + position
    if source + BLOCK_BYTES > readable_end:
        for index in range(left):
            store_byte(scanner.block + index, np.uint64(load_byte(source + index)))
        source = scanner.block
    letters, numbers, white, blanks, apostrophes, leads = byte_masks(source)
    valid = low_bits(left) if left < BLOCK_BYTES else ALL_ONES
    letters, numbers, white, leads = letters & valid, numbers & valid, white & valid, leads & valid
    white_tails, next_over = NOTHING, NOTHING
    if leads | over != NOTHING:
        kind, bits = over_kind, over
        while True:  # bytes of no character stay without a bit, which makes them others
            if kind == LETTER_KIND:
                letters |= bits
            elif kind == NUMBER_KIND:
                numbers |= bits
            elif kind == SPACE_KIND:
                white |= bits
                white_tails |= bits & (bits << ONE | over)
            if leads == NOTHING:
                break
            place = trailing_zeros(leads)
            leads &= leads - ONE
            found = wide_character(text, position + place, end, scanner.classes)
            width, kind = found >> 2, found & 3
            bits = low_bits(width) << np.uint64(place)
            if place + width > BLOCK_BYTES:
                next_over, over_kind = low_bits(place + width - BLOCK_BYTES), kind
    return Block(
        letters, numbers, white | ~valid, blanks & valid, apostrophes & valid, white_tails, next_over, over_kind
    )


@inlined
def last_of_white(block: Block, behind: Block) -> np.uint64:
    """First byte of every white-space character that is followed by another kind; the next block decides the last."""
    last = block.white & ~(block.white >> ONE | behind.white << TOP_BIT)
    if block.white_tails | behind.white_tails != NOTHING:  # from a character's last byte to its first: 2 bytes at most
        last_behind = behind.white & ~(behind.white >> ONE)
        for _ in range(2):
            moved, moved_behind = last & block.white_tails, last_behind & behind.white_tails
            last = (last ^ moved) | moved >> ONE | moved_behind << TOP_BIT
            last_behind = (last_behind ^ moved_behind) | moved_behind >> ONE
    return last


@helper
def contraction(text: int, position: int, end: int) -> int:
    """Length of 's 't 'd 'm 're 've 'll at an apostrophe, or 0."""
    if position + 1 >= end:
        return 0
    second = load_byte(text + position + 1)
    if second == 0x73 or second == 0x74 or second == 0x64 or second == 0x6D:
        return 2
    if position + 2 >= end:
        return 0
    third = load_byte(text + position + 2)
    if (second == 0x6C and third == 0x6C) or ((second == 0x72 or second == 0x76) and third == 0x65):
        return 3
    return 0


@inlined
def write_places(places: np.uint64, position: int, target: int) -> int:
    """Write position + the number of every one bit as int64 to the target, garbage after them; returns how many."""
    count = ones(places)
    done = 0
    while done < count:
        for index in range(8):
            put_64(target, done + index, position + trailing_zeros(places))
            places &= places - ONE
        done += 8
    return count


@helper
def scan_gpt2(text: int, position: int, end: int, readable_end: int, scanner: Scanner) -> int:
    """Write the ends of the pretokens from position < end on to scanner.ends; returns how many, at least one.

    They are all pretokens up to end, or about max_pretokens; the next scan then begins where the last of them ends.
    """
    count = 0
    skipped = ONE  # the first pretoken starts at the position, which is the end of none
    before_letter = before_number = before_white = before_other = before_blank = NOTHING  # the bit before the block
    cleared = added = NOTHING  # starts that contractions of the block before remove and add in this one
    block = read_block(text, position, end, readable_end, scanner, NOTHING, OTHER_KIND)
    while position < end and count < scanner.max_pretokens:
        behind = read_block(text, position + BLOCK_BYTES, end, readable_end, scanner, block.over, block.over_kind)
        letters, numbers, white = block.letters, block.numbers, block.white
        others = ~(letters | numbers | white)
        goes_on = letters & (letters << ONE | before_letter)
        goes_on |= numbers & (numbers << ONE | before_number)
        goes_on |= white & (white << ONE | before_white)
        goes_on |= others & (others << ONE | before_other)
        behind_blank = ~white & (block.blanks << ONE | before_blank)
        starts = ~goes_on & ~behind_blank | last_of_white(block, behind)
        starts = starts & ~cleared | added
        cleared = added = NOTHING
        candidates = block.apostrophes & starts
        while candidates != NOTHING:
            place = trailing_zeros(candidates)
            candidates &= candidates - ONE
            length = contraction(text, position + place, end)
            if length > 0:
                follows = ONE << np.uint64(place)
                starts &= ~(follows << ONE)
                cleared |= follows >> TOP_BIT
                if place + length < BLOCK_BYTES:
                    starts |= follows << np.uint64(length)
                else:
                    added |= ONE << np.uint64(place + length - BLOCK_BYTES)
        left = end - position
        if left < BLOCK_BYTES:
            starts &= low_bits(left)
        count += write_places(starts & ~skipped, position, scanner.ends + 8 * count)
        skipped = NOTHING
        before_letter, before_number = letters >> TOP_BIT, numbers >> TOP_BIT
        before_white, before_other = white >> TOP_BIT, others >> TOP_BIT
        before_blank = block.blanks >> TOP_BIT
        block = behind
        position += BLOCK_BYTES
    if position >= end:
        put_64(scanner.ends, count, end)
        count += 1
    return count
