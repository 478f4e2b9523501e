"""MinHash signatures in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4).

The probability that two documents of similarity s have the same least hash is s, so that all of the ``rows`` of one of
``bands`` agree with the probability 1 - (1 - s**rows)**bands: with 14 bands of 8, as FineWeb has them, 0.05 for 0.5,
0.56 for 0.7, 0.92 for 0.8 and 0.9996 for 0.9. A band is kept as one key of 64 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.deduplication.kernels import minhash as kernels
from pipeline.deduplication.shingles import Ends, shingle_hashes, word_hashes

_SEED = 1

Keys = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How documents are compared. The defaults are FineWeb's (Penedo and others 2024)."""

    words: int = 5
    """Words of a shingle."""
    bands: int = 14
    rows: int = 8
    """Hashes of a band."""

    def probability(self, similarity: float) -> float:
        """That two documents of this similarity have a key in common."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def sign(texts: Any, scheme: Scheme) -> tuple[Keys, Halves, Ends]:
    """The keys of all documents, (documents, bands), and their shingles: (n,) uint32 with ends by document.

    ``texts``: an Arrow array of strings without nulls. A document without a word has no shingle, and 0 for keys.
    """
    shingles, ends = shingle_hashes(word_hashes(texts), scheme.words)
    halves = np.empty(len(shingles), np.uint32)
    kernels.top_halves(shingles, halves)
    keys = np.zeros((len(ends), scheme.bands), np.uint64)
    kernels.band_keys(halves, ends, *permutations(scheme.bands, scheme.rows), keys)
    return keys, halves, ends


@functools.cache
def permutations(bands: int, rows: int) -> tuple[Halves, Halves]:
    """Odd factors and shifts of bands x rows permutations of the 32-bit numbers, each (bands, rows) uint32."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    values = generator.integers(0, 1 << 32, (2, bands, rows), dtype=np.uint64).astype(np.uint32)
    return np.ascontiguousarray(values[0] | np.uint32(1)), np.ascontiguousarray(values[1])


def similarity(one: Halves, other: Halves) -> float:
    """Jaccard's similarity of two sets of shingles, which ascend and hold none twice."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def warm_up() -> None:
    """Compile the kernels unless they are cached. A driver calls it before its workers start."""
    sign(pa.array(["a few words"], pa.large_string()), Scheme())
