"""Documents before they are written: divided into train and val, and encoded as token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.dataset.manifest import SPLITS
from pipeline.sources.arrow_values import values_of
from pipeline.tokenizer.bpe import Tokenizer

_ROOM_BYTES_PER_ID = 6  # of a part, of which an item is half: room for an id per 3 bytes, and English has 4
_SLICE_BYTES = 200_000  # of text, which are copied in the 30 microseconds that one more slice costs the tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodedPart:
    """Encoded documents of a work item, for one shard per split."""

    ids: dict[str, npt.NDArray[Any]]
    """Split -> token ids, each document preceded by an eot_id."""
    documents: dict[str, int]
    text_bytes: dict[str, int]
    """UTF-8 bytes of the documents."""
    lengths: npt.NDArray[np.int64]
    """``length_counts`` of the documents of both splits."""
    is_last: bool
    """Whether the item ends with this part."""


def encode_parts(
    arrays: Iterable[pa.Array], tokenizer: Tokenizer, *, val_fraction: float, part_bytes: int
) -> Iterator[EncodedPart]:
    """Split and encode the texts of an item, array by array: at least one part, and a new one after ``part_bytes``.

    An item of the expected size is one part. Memory holds one array of text and the ids of one part, however large the
    item is, which may be a compressed file of 40 GB.
    """
    builder = _PartBuilder(tokenizer, val_fraction, part_bytes)
    for array in arrays:
        if builder.num_bytes >= part_bytes:
            yield builder.build(is_last=False)
            builder = _PartBuilder(tokenizer, val_fraction, part_bytes)
        builder.add(array)
    yield builder.build(is_last=True)


class _PartBuilder:
    def __init__(self, tokenizer: Tokenizer, val_fraction: float, part_bytes: int) -> None:
        self._tokenizer, self._val_fraction = tokenizer, val_fraction
        room = part_bytes // _ROOM_BYTES_PER_ID
        self._ids = {split: _IdBuffer(tokenizer.id_dtype, room) for split in SPLITS}
        self._documents, self._text_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self._lengths = np.zeros(0, np.int64)
        self.num_bytes = 0

    def add(self, array: Any) -> None:
        texts = pa.chunked_array([array.cast(pa.large_string())])
        self._lengths = add_counts(self._lengths, length_counts(texts))
        for split, part in zip(SPLITS, split_by_hash(texts, self._val_fraction), strict=True):
            self._documents[split] += len(part)
            self._text_bytes[split] += text_bytes(part)
            self._ids[split].append(encode_documents(self._tokenizer, part))
        self.num_bytes += text_bytes(texts)

    def build(self, *, is_last: bool) -> EncodedPart:
        ids = {split: growing.view() for split, growing in self._ids.items()}
        return EncodedPart(
            ids=ids, documents=self._documents, text_bytes=self._text_bytes, lengths=self._lengths, is_last=is_last
        )


class _IdBuffer:
    """An array of ids that grows by copying new ids to its end while they are in the processor's cache."""

    def __init__(self, dtype: np.dtype[Any], room: int) -> None:
        """``room``: ids to allocate at first; pages that are never written take no memory."""
        self._array, self._size, self._room = np.empty(0, dtype), 0, room

    def append(self, ids: npt.NDArray[Any]) -> None:
        end = self._size + len(ids)
        if self._size == 0:
            self._array, self._size = ids, end
            return
        if end > len(self._array):
            larger = np.empty(max(self._room, 2 * end), ids.dtype)
            larger[: self._size] = self._array[: self._size]
            self._array = larger
        self._array[self._size : end] = ids
        self._size = end

    def view(self) -> npt.NDArray[Any]:
        return self._array[: self._size]


def in_groups(arrays: Iterable[pa.Array], group_bytes: int) -> Iterator[list[pa.Array]]:
    """Lists of neighbouring arrays that hold ``group_bytes`` of text together."""
    group: list[pa.Array] = []
    num_bytes = 0
    for array in arrays:
        group.append(array)
        num_bytes += text_bytes(array)
        if num_bytes >= group_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def text_bytes(texts: Any) -> int:
    """UTF-8 bytes of an Arrow array of strings, plain or chunked."""
    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


def length_counts(texts: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Number of documents of 2**i to 2**(i + 1) - 1 UTF-8 bytes, for i from 0 to that of the longest."""
    lengths = np.maximum(pc.binary_length(texts).to_numpy(), 1)
    return np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1).astype(np.int64)


def add_counts(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sum of two counts of different length."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def split_by_hash(texts: pa.ChunkedArray, val_fraction: float) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The documents of train and of val, in order; the hash of its UTF-8 bytes decides the split of a document.

    The hash is XXH3 of 64 bits (xxhash.com); that of a val document is below ``val_fraction`` * 2**64. (sha256, which
    nobody could forge, would take a tenth of the time of a tokenization.) The choice depends on the text alone: copies
    of a document fall on one side, in whatever files and order they lie. ``texts``: large_string without nulls. Where
    few documents are val, those of train are slices of ``texts``, which are not copied.
    """
    if val_fraction == 0:
        return texts, texts.slice(0, 0)
    limit = int(val_fraction * 2**64)
    train: list[Any] = []
    val: list[Any] = []
    for chunk in filter(len, texts.chunks):
        rows = [row for row, text in enumerate(values_of(chunk)) if xxhash.xxh3_64_intdigest(text) < limit]
        train += _without(chunk, rows, text_bytes(chunk))
        val.append(chunk.take(pa.array(rows, pa.int64())))
    return pa.chunked_array(train, texts.type), pa.chunked_array(val, texts.type)


def _without(texts: Any, rows: list[int], num_bytes: int) -> list[Any]:
    """All documents, of ``num_bytes`` in all, except ``rows``, which ascend; as one copy, or as slices."""
    if len(rows) * _SLICE_BYTES > num_bytes:
        is_kept = np.ones(len(texts), dtype=bool)
        is_kept[rows] = False
        return [texts.filter(pa.array(is_kept))]
    edges = itertools.pairwise([-1, *rows, len(texts)])
    return [texts.slice(before + 1, row - before - 1) for before, row in edges if row > before + 1]


def encode_documents(tokenizer: Tokenizer, texts: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Token ids of all documents, each preceded by an ``eot_id``."""
    ids, _ = tokenizer.encode_arrow(texts, prefix=tokenizer.eot_id)
    return ids
