"""What becomes of a document before it is written: to train or to val, and from text to token ids."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.bpe import Tokenizer

_SLICE_BYTES = 200_000  # copied in the time, about 30 microseconds, that one more slice costs the tokenizer


def split_by_hash(texts: pa.ChunkedArray, val_fraction: float) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The documents of train and of val, in order: a document is val if the hash of its UTF-8 bytes says so.

    The choice depends on the text alone: copies of a document fall on one side, in whatever files and order they lie.
    ``texts``: large_string without nulls. Where few documents are val, those of train are slices of ``texts``, which
    are not copied.
    """
    if val_fraction == 0:
        return texts, texts.slice(0, 0)
    limit = int(val_fraction * 2**64).to_bytes(8, "big")
    train: list[Any] = []
    val: list[Any] = []
    for chunk in filter(len, texts.chunks):
        offsets, data = _offsets_and_data(chunk)
        rows = [
            row
            for row, (begin, end) in enumerate(itertools.pairwise(offsets))
            if hashlib.sha256(data[begin:end]).digest() < limit  # the first 8 bytes decide
        ]
        train += _without(chunk, rows, offsets[-1] - offsets[0])
        val.append(chunk.take(pa.array(rows, pa.int64())))
    return pa.chunked_array(train, texts.type), pa.chunked_array(val, texts.type)


def _offsets_and_data(texts: Any) -> tuple[list[int], memoryview]:
    """Document i is ``data[offsets[i]:offsets[i + 1]]``."""
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return offsets.tolist(), memoryview(data_buffer)


def _without(texts: Any, rows: list[int], num_bytes: int) -> list[Any]:
    """All documents, of ``num_bytes`` together, but those of ``rows``, which ascend; as one copy, or as slices."""
    if len(rows) * _SLICE_BYTES > num_bytes:
        is_kept = np.ones(len(texts), dtype=bool)
        is_kept[rows] = False
        return [texts.filter(pa.array(is_kept))]
    edges = itertools.pairwise([-1, *rows, len(texts)])
    return [texts.slice(before + 1, row - before - 1) for before, row in edges if row > before + 1]


def encode_documents(tokenizer: Tokenizer, texts: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Token ids of all documents, each behind an ``eot_id``."""
    ids, _ = tokenizer.encode_arrow(texts, prefix=tokenizer.eot_id)
    return ids
