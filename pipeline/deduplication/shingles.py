"""Documents as sets of shingles: hashes of every run of some words, after case, accents and punctuation are gone.

Two documents are alike as far as they share shingles: their similarity is Jaccard's, the number of shingles that both
have divided by the number that at least one has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.deduplication.characters import character_table
from pipeline.deduplication.kernels import words as kernels
from pipeline.tokenizer.text_buffers import text_buffers

Hashes = npt.NDArray[np.uint64]
Ends = npt.NDArray[np.int64]


class HashLists(NamedTuple):
    """Hashes of several documents, one behind the other."""

    hashes: Hashes
    ends: Ends
    """Document i has hashes [ends[i - 1], ends[i])."""


def word_hashes(texts: Any, table: npt.NDArray[np.int32] | None = None) -> HashLists:
    """Hashes of the words of every document.

    Args:
        texts: an Arrow array of strings without nulls, not chunked.
        table: what every character is in a word; by default ``character_table()``.
    """
    table = character_table() if table is None else table
    ends = np.zeros(len(texts), np.int64)
    buffers = list(text_buffers(texts)) if isinstance(texts, pa.Array) else []
    if not buffers:
        return HashLists(np.zeros(0, np.uint64), ends)
    buffer = buffers[0]
    words = np.empty(int(((buffer.stops - buffer.starts + 1) // 2).sum()), np.uint64)
    starts, stops = (np.ascontiguousarray(array).copy() for array in (buffer.starts, buffer.stops))
    kernels.hash_words(buffer.address, starts, stops, table.ctypes.data, words, ends)
    return HashLists(words[: ends[-1]], ends)


def shingle_hashes(words: HashLists, length: int, *, only_whole: bool = False) -> HashLists:
    """Hashes of all runs of ``length`` words of every document, repeated ones included.

    A document of fewer words has one shingle of all of them, or none where ``only_whole``; one without words none.
    """
    shingles = np.empty(len(words.hashes), np.uint64)
    ends = np.zeros(len(words.ends), np.int64)
    kernels.hash_shingles(words.hashes, words.ends, length, int(only_whole), shingles, ends)
    return HashLists(shingles[: ends[-1] if len(ends) else 0], ends)
