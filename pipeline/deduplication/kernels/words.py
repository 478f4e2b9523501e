"""The numba loops that turn text into hashes of words, and runs of words into hashes of shingles.

A word is hashed character by character, after each character was looked up in a table (characters.py) that folds case
and accents, drops combining marks, makes every run of digits one sign, and says what stands between words.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.memory import get_32, load_byte

SEPARATOR, MARK, DIGIT = 0, 1, 2  # entries of the table that are no character
ALONE = 1 << 30  # added to a character that is a word by itself
TABLE_SIZE = 0x20000  # code points in the table; those behind it are words by themselves

_NOTHING = np.uint64(0)
_SEED = np.uint64(0x9E3779B97F4A7C15)
_BY_CHARACTER = np.uint64(0xD6E8FEB86659FD93)
_BY_WORD = np.uint64(0x9FB21C651E98DF25)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


@inlined
def mixed(word: np.uint64) -> np.uint64:
    """A word with every bit depending on all bits: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    word = (word ^ (word >> _30)) * _MIX_1
    word = (word ^ (word >> _27)) * _MIX_2
    return word ^ (word >> _31)


@helper
def long_character(address: int, first: int) -> int:
    """The code point of a character of 2 to 4 bytes of valid UTF-8, whose first byte is given."""
    second = load_byte(address + 1) & 0x3F
    if first < 0xE0:
        return (first & 0x1F) << 6 | second
    third = load_byte(address + 2) & 0x3F
    if first < 0xF0:
        return (first & 0x0F) << 12 | second << 6 | third
    return (first & 0x07) << 18 | second << 12 | third << 6 | load_byte(address + 3) & 0x3F


@helper
def hash_document(text: int, start: int, stop: int, table: int, words: npt.NDArray[np.uint64], count: int) -> int:
    """Write the hashes of the words of bytes [start, stop) behind the ``count`` that are there; returns the new count.

    A hash is never 0, which stands for no word begun.
    """
    state = _NOTHING
    previous = SEPARATOR
    position = start
    while position < stop:
        point = load_byte(text + position)
        size = 1
        if point >= 0x80:
            size = 2 if point < 0xE0 else 3 if point < 0xF0 else 4
            point = long_character(text + position, point)
        position += size
        entry = get_32(table, point) if point < TABLE_SIZE else point + ALONE
        if entry == MARK or (entry == DIGIT and previous == DIGIT):
            continue
        if (entry == SEPARATOR or entry >= ALONE) and state != _NOTHING:
            words[count] = mixed(state)
            count += 1
            state = _NOTHING
        previous = entry
        if entry >= ALONE:
            words[count] = mixed((_SEED ^ np.uint64(entry)) * _BY_CHARACTER)
            count += 1
        elif entry != SEPARATOR:
            if state == _NOTHING:
                state = _SEED
            state = (state ^ np.uint64(entry)) * _BY_CHARACTER
    if state != _NOTHING:
        words[count] = mixed(state)
        count += 1
    return count


@kernel
def hash_words(
    text: int,
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    table: int,
    words: npt.NDArray[np.uint64],
    ends: npt.NDArray[np.int64],
) -> None:
    """Hashes of the words of all documents, into ``words``; document i has those up to ends[i].

    ``words`` must hold half the bytes of every document, rounded up. table: address of int32 of TABLE_SIZE.
    """
    count = 0
    for document in range(starts.size):
        count = hash_document(text, starts[document], stops[document], table, words, count)
        ends[document] = count


@kernel
def hash_shingles(
    words: npt.NDArray[np.uint64],
    word_ends: npt.NDArray[np.int64],
    length: int,
    only_whole: int,
    shingles: npt.NDArray[np.uint64],
    ends: npt.NDArray[np.int64],
) -> None:
    """Hashes of all runs of ``length`` words of every document, into ``shingles``; document i has those up to ends[i].

    A document of fewer words has one shingle of all of them, or none with ``only_whole`` 1. ``shingles`` must hold as
    many as there are words.
    """
    power = np.uint64(1)
    for _ in range(length):
        power *= _BY_WORD
    count = 0
    begin = 0
    for document in range(word_ends.size):
        end = word_ends[document]
        state = _NOTHING
        for position in range(begin, end):
            state = state * _BY_WORD + words[position]
            if position >= begin + length:
                state -= words[position - length] * power
            if position >= begin + length - 1:
                shingles[count] = mixed(state)
                count += 1
        if only_whole == 0 and 0 < end - begin < length:
            shingles[count] = mixed(state ^ length_mark(end - begin))
            count += 1
        ends[document] = count
        begin = end


@inlined
def length_mark(length: int) -> np.uint64:
    """The number of words of a short document as a word, so that it differs from the beginning of a longer one."""
    return np.uint64(length) << np.uint64(56)
