"""The numba loop that looks for the runs of words of evaluation sets in documents.

A table of bits, 64 for each run that is looked for, answers nearly every time that a run is none of them; what is left
is looked for in the sorted hashes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, kernel

_ONE, _SIX, _LOW_SIX = np.uint64(1), np.uint64(6), np.uint64(63)


@kernel
def set_bits(hashes: npt.NDArray[np.uint64], bits: npt.NDArray[np.uint64]) -> None:
    """Set the bit of every hash. The number of words in ``bits`` must be a power of two."""
    mask = np.uint64(bits.size - 1)
    for index in range(hashes.size):
        bits[(hashes[index] >> _SIX) & mask] |= _ONE << (hashes[index] & _LOW_SIX)


@helper
def place_of(hashes: npt.NDArray[np.uint64], wanted: np.uint64) -> int:
    """Where a hash stands among the ascending ones, or -1."""
    low, high = 0, hashes.size
    while low < high:
        middle = (low + high) >> 1
        if hashes[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < hashes.size and hashes[low] == wanted else -1


@kernel
def find_first(
    shingles: npt.NDArray[np.uint64],
    ends: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    bits: npt.NDArray[np.uint64],
    found: npt.NDArray[np.int64],
) -> None:
    """Of every document the first run of words that is among ``hashes``, which ascend.

    found: (documents, 2) the number of the run in its document, and its place in ``hashes``; -1 where there is none.
    """
    mask = np.uint64(bits.size - 1)
    begin = 0
    for document in range(ends.size):
        found[document, 0] = found[document, 1] = -1
        for position in range(begin, ends[document]):
            shingle = shingles[position]
            if bits[(shingle >> _SIX) & mask] >> (shingle & _LOW_SIX) & _ONE:
                place = place_of(hashes, shingle)
                if place >= 0:
                    found[document, 0], found[document, 1] = position - begin, place
                    break
        begin = ends[document]
