"""The numba loops that count runs of words in one document: the most frequent one, and those that came before.

Words are numbers, equal for equal words. A run is hashed from the run before it, and found again in a table of open
addresses; runs with the same hash are compared by their words' numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, kernel

_FACTOR = np.uint64(0x9FB21C651E98DF25)
_29 = np.uint64(29)


@helper
def slot_of(words: npt.NDArray[np.int64], start: int, length: int, table: npt.NDArray[np.int64]) -> np.int64:
    """The place in ``table`` of the run that begins at word ``start``, or where it would go.

    table: number of the first word of a run, from 1; 0 is free. Its size must be a power of two.
    """
    state = np.uint64(0)
    for position in range(start, start + length):
        state = (state ^ np.uint64(words[position])) * _FACTOR
        state ^= state >> _29
    slot = np.int64(state & np.uint64(table.size - 1))
    while table[slot] != 0:
        other = table[slot] - 1
        position = 0
        while position < length and words[other + position] == words[start + position]:
            position += 1
        if position == length:
            break
        slot = (slot + 1) & (table.size - 1)
    return slot


@kernel
def most_frequent(
    words: npt.NDArray[np.int64], length: int, table: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> np.int64:
    """Where the most frequent run of ``length`` words first begins, the earliest of several; -1 in too short a text.

    How often it occurs is then in counts[-1]. counts: one more than the entries of ``table``.
    """
    table[:] = 0
    counts[:] = 0
    for start in range(words.size - length + 1):
        slot = slot_of(words, start, length, table)
        if table[slot] == 0:
            table[slot] = start + 1
        counts[slot] += 1
    best, most = np.int64(-1), np.int64(0)
    for slot in range(table.size):
        if table[slot] and (counts[slot] > most or (counts[slot] == most and table[slot] - 1 < best)):
            best, most = table[slot] - 1, counts[slot]
    counts[-1] = most
    return best


@kernel
def repeated_characters(
    words: npt.NDArray[np.int64], characters: npt.NDArray[np.int64], length: int, table: npt.NDArray[np.int64]
) -> np.int64:
    """Characters of the runs of ``length`` words that came before; runs that overlap a counted one are left out.

    characters: of each word.
    """
    table[:] = 0
    total = np.int64(0)
    start = 0
    while start + length <= words.size:
        slot = slot_of(words, start, length, table)
        if table[slot] == 0:
            table[slot] = start + 1
            start += 1
        else:
            for position in range(start, start + length):
                total += characters[position]
            start += length
    return total
