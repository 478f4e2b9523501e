"""The numba loops of MinHash: the least hash of a document's shingles under many permutations, in bands.

A permutation of the 32-bit numbers is x -> a x + b modulo 2**32 with odd a. The inner loop has no branch and becomes
vector instructions: eight hashes a multiplication with AVX2, sixteen with AVX-512.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.deduplication.kernels.words import mixed
from pipeline.tokenizer.kernels.cache import helper, kernel

_TOP_HALF = np.uint64(32)
_LARGEST = np.uint32(0xFFFFFFFF)


@kernel
def top_halves(shingles: npt.NDArray[np.uint64], halves: npt.NDArray[np.uint32]) -> None:
    """The top 32 bits of every hash."""
    for index in range(shingles.size):
        halves[index] = np.uint32(shingles[index] >> _TOP_HALF)


@helper
def least_hash(shingles: npt.NDArray[np.uint32], factor: np.uint32, shift: np.uint32) -> np.uint32:
    """The least a x + b modulo 2**32 of a document's shingles."""
    least = _LARGEST
    for index in range(shingles.size):  # from 0 on, so that no index is looked at whether it is negative
        value = np.uint32(np.uint32(shingles[index] * factor) + shift)
        least = value if value < least else least
    return least


@kernel
def band_keys(
    shingles: npt.NDArray[np.uint32],
    ends: npt.NDArray[np.int64],
    factors: npt.NDArray[np.uint32],
    shifts: npt.NDArray[np.uint32],
    keys: npt.NDArray[np.uint64],
) -> None:
    """A key of every band of every document: documents with the same key have the same least hashes in that band.

    factors, shifts: (bands, rows). keys: (documents, bands), 0 for a document without shingles. The number of the band
    is hashed, too, so that keys of different bands differ.
    """
    bands, rows = factors.shape
    begin = 0
    for document in range(ends.size):
        end = ends[document]
        own = shingles[begin:end]
        for band in range(bands):
            key = np.uint64(band + 1)
            for row in range(rows):
                least = least_hash(own, factors[band, row], shifts[band, row])
                key = mixed(key ^ np.uint64(least)) + np.uint64(row)
            keys[document, band] = key if end > begin else np.uint64(0)
        begin = end
