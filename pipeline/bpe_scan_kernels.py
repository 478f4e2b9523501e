"""The numba loops that cut text into pieces by GPT-2's pattern: bytes in, end offsets out, nothing else known.

The pattern, over UTF-8: 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
A byte that belongs to no character counts as a character that is neither letter, number nor white space.

Memory is read and written through raw addresses, here and in the kernels of encoding and training: arrays in tuples
would cost two atomic reference counts per use, and every index a look whether it is negative. No read goes past the end
that is given.
"""

# ruff: noqa: PLR0917, PLR1714  numba calls by position, and calls by position, and compiles comparisons better than sets

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipeline.kernel_cache import helper

LETTER_CLASS, SPACE_CLASS = 1, 3  # of unicode_table.character_classes; the others are only compared with each other
EVERY_BYTE = np.uint64(0x0101010101010101)
HIGH_BITS = np.uint64(0x80) * EVERY_BYTE

# --- raw memory ------------------------------------------------------------------------------------------------------


def _loader(bits: int, result: Any) -> Any:
    """load(address) of an integer without alignment; below 64 bits zeros are added in front."""

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(pointer, align=1), ir.IntType(64))

        return result(types.int64), generate

    return load


def _storer(bits: int) -> Any:
    """store(address, value) of the lowest bits of a uint64 without alignment."""

    @intrinsic
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(builder.trunc(arguments[1], ir.IntType(bits)), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64), generate

    return store


def _getter(bits: int) -> Any:
    """get(array, index) of a signed integer of the array at an address."""

    @intrinsic
    def get(typing_context: Any, array: Any, index: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.sext(builder.load(builder.gep(pointer, [arguments[1]])), ir.IntType(64))

        return types.int64(types.int64, types.int64), generate

    return get


def _putter(bits: int) -> Any:
    """put(array, index, value) of a signed integer into the array at an address."""

    @intrinsic
    def put(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(builder.trunc(arguments[2], ir.IntType(bits)), builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return put


def _trailing_zeros(typing_context: Any, word: Any) -> Any:
    """trailing_zeros(word): number of zero bits below the lowest one bit; 64 for zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


trailing_zeros: Any = intrinsic(_trailing_zeros)
load_byte = _loader(8, types.int64)
load_word = _loader(64, types.uint64)
store_byte = _storer(8)
store_16 = _storer(16)
store_32 = _storer(32)
store_word = _storer(64)
get_32 = _getter(32)
get_64 = _getter(64)
put_32 = _putter(32)
put_64 = _putter(64)


@helper
def signed(word: np.uint64) -> int:
    """A word as an int64: numba makes floating-point numbers of sums of both kinds."""
    return np.int64(word)  # type: ignore[return-value]  # numba's integers are numpy's


# --- cutting text into pieces ----------------------------------------------------------------------------------------


@helper
def character(text: int, position: int, end: int, classes: int) -> int:
    """Class and width of the character at position < end, as width << 2 | class; a bad byte is one OTHER."""
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
    if code < least or code > 0x10FFFF:
        return 4
    return width << 2 | load_byte(classes + code)  # a surrogate is OTHER in the table, as its three bad bytes are


@helper
def run_end(text: int, position: int, end: int, kind: int, classes: int) -> int:
    """Where the run of characters of one class stops."""
    while position < end:
        byte = load_byte(text + position)
        if byte < 0x80:
            if load_byte(classes + byte) != kind:
                break
            position += 1
        else:
            found = character(text, position, end, classes)
            if found & 3 != kind:
                break
            position += found >> 2
    return position


@helper
def ascii_letters_end(text: int, position: int, end: int) -> int:
    """Where the ASCII letters from position on stop, as far as whole words of 8 bytes tell; most words need one look.

    Each byte, in lower case and without its top bit, plus 0x1f reaches 0x80 from "a" on, plus 0x05 beyond "z".
    """
    while position + 8 <= end:
        word = load_word(text + position)
        lower = (word | np.uint64(0x20) * EVERY_BYTE) & ~HIGH_BITS
        is_letter = (lower + np.uint64(0x1F) * EVERY_BYTE) & ~(lower + np.uint64(0x05) * EVERY_BYTE) & ~word
        letters = trailing_zeros(~is_letter & HIGH_BITS) >> 3
        position += letters
        if letters < 8:
            break
    return position


@helper
def space_end(text: int, position: int, end: int, classes: int) -> int:
    """White space: all of it at the end of the text, else all but the last character, if there are two."""
    last = position
    stop = position
    while stop < end:
        found = character(text, stop, end, classes)
        if found & 3 != SPACE_CLASS:
            break
        last = stop
        stop += found >> 2
    return stop if stop == end or last == position else last


@helper
def contraction_end(text: int, position: int, end: int) -> int:
    """End of 's 't 'd 'm 're 've 'll at an apostrophe, or the position itself."""
    if position + 1 >= end:
        return position
    second = load_byte(text + position + 1)
    if second == 0x73 or second == 0x74 or second == 0x64 or second == 0x6D:
        return position + 2
    if position + 2 >= end:
        return position
    third = load_byte(text + position + 2)
    if (second == 0x6C and third == 0x6C) or ((second == 0x72 or second == 0x76) and third == 0x65):
        return position + 3
    return position


@helper
def piece_end(text: int, position: int, end: int, classes: int) -> int:
    """End of the piece that starts at position < end, by GPT-2's pattern."""
    first = load_byte(text + position)
    if first == 0x27:
        stop = contraction_end(text, position, end)
        if stop > position:
            return stop
    body = position + 1 if first == 0x20 and position + 1 < end else position
    letters = ascii_letters_end(text, body, end)
    if letters > body:
        return run_end(text, letters, end, LETTER_CLASS, classes)
    found = character(text, body, end, classes)
    kind = found & 3
    if kind == SPACE_CLASS:
        return space_end(text, position, end, classes)
    return run_end(text, body + (found >> 2), end, kind, classes)


@helper
def scan(text: int, position: int, end: int, classes: int, ends: int, limit: int) -> int:
    """Write the ends of the pieces from position on, limit of them at most, as int64 to the address ends; returns how
    many. Pieces begin where the one before ends, so a scan that was cut short goes on from there."""
    count = 0
    while position < end and count < limit:
        position = piece_end(text, position, end, classes)
        put_64(ends, count, position)
        count += 1
    return count
