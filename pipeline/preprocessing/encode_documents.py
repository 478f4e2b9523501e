"""Documents before they are written: divided into train and val, and encoded as token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.dataset.manifest import SPLITS
from pipeline.sources.arrow_values import array_of, offsets_of, values_of
from pipeline.tokenizer.bpe import Tokenizer

_CUT_BYTES = 1 << 20  # of text that are looked at together
_SLICE_BYTES = 200_000  # of text, which are copied in the 30 microseconds that one more slice costs the tokenizer


@dataclass(kw_only=True)
class EncodedPart:
    """Encoded documents of a work item, for one shard per split."""

    dtype: np.dtype[Any]
    """Type of the token ids."""
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """UTF-8 bytes of the documents."""
    lengths: list[int] = field(default_factory=list)
    """``length_counts`` of the documents of both splits."""
    is_last: bool = False
    """Whether the item ends with this part."""
    _ids: dict[str, bytearray] = field(default_factory=lambda: {split: bytearray() for split in SPLITS})

    @property
    def ids(self) -> dict[str, npt.NDArray[Any]]:
        """Split -> token ids, each document preceded by an eot_id; no documents may be added while they are in use."""
        return {split: np.frombuffer(content, self.dtype) for split, content in self._ids.items()}

    def add(self, texts: pa.ChunkedArray, tokenizer: Tokenizer, val_fraction: float, val_split: str) -> None:
        """Split and encode documents; the ids grow in place, while the new ones are in the processor's cache."""
        self.lengths = add_counts([self.lengths, length_counts(texts)])
        for split, part in zip(SPLITS, split_texts(texts, val_fraction, val_split), strict=True):
            self.documents[split] += len(part)
            self.text_bytes[split] += text_bytes(part)
            self._ids[split] += encode_documents(tokenizer, part).data


def encode_parts(
    arrays: Iterable[Any],
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    part_bytes: int,
    val_split: str = "documents",
) -> Iterator[EncodedPart]:
    """Split and encode the texts of an item, array by array: at least one part, and a new one after ``part_bytes``.

    An item of the expected size is one part. Memory holds one array of text and the ids of one part, however large the
    item is, which may be a compressed file of 40 GB.
    """
    part = EncodedPart(dtype=tokenizer.id_dtype)
    for array in arrays:
        if sum(part.text_bytes.values()) >= part_bytes:
            yield part
            part = EncodedPart(dtype=tokenizer.id_dtype)
        part.add(pa.chunked_array([array.cast(pa.large_string())]), tokenizer, val_fraction, val_split)
    part.is_last = True
    yield part


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


def length_counts(texts: pa.ChunkedArray) -> list[int]:
    """Number of documents of 2**i to 2**(i + 1) - 1 UTF-8 bytes, for i from 0 to that of the longest."""
    lengths = np.maximum(pc.binary_length(texts).to_numpy(), 1)
    return np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1).tolist()


def add_counts(counts: Iterable[Sequence[int]]) -> list[int]:
    """The sum of counts of different length."""
    return [sum(column) for column in itertools.zip_longest(*counts, fillvalue=0)]


def split_texts(texts: pa.ChunkedArray, val_fraction: float, val_split: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The texts of train and of val, in order; ``val_split``: documents or tail, as in the settings."""
    split = split_by_position if val_split == "tail" else split_by_hash
    return split(texts, val_fraction)


def split_by_position(texts: pa.ChunkedArray, val_fraction: float) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The first n * (1 - val_fraction) of the n characters of every document, and the rest.

    As nanoGPT's data/shakespeare/prepare.py does it with one text. A part without a character is left out.
    """
    if val_fraction == 0:
        return texts, texts.slice(0, 0)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for chunk in filter(len, texts.chunks):
        content, offsets = chunk.buffers()[2], offsets_of(chunk)
        chars = pc.utf8_length(chunk).to_numpy()
        cuts = [
            _byte_of(content, begin, int(number * (1 - val_fraction)))
            for begin, number in zip(offsets[:-1].tolist(), chars.tolist(), strict=True)
        ]
        for part, begins, ends in ((parts[0], offsets[:-1], cuts), (parts[1], cuts, offsets[1:])):
            ranges = [(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True) if begin < end]
            part += [array_of(content, begin, end, chunk.type) for begin, end in ranges]
    train, val = (pa.chunked_array([pa.concat_arrays(part)] if part else [], texts.type) for part in parts)
    return train, val


def _byte_of(content: Any, begin: int, chars: int) -> int:
    """Position of the byte behind ``chars`` characters of UTF-8 that begin at ``begin``."""
    content = np.frombuffer(content, np.uint8)
    while chars > 0:
        piece = content[begin : begin + min(chars, _CUT_BYTES)]  # of as many characters at most
        chars -= int(np.count_nonzero((piece & 0xC0) != 0x80))
        begin += len(piece)
    while begin < len(content) and content[begin] & 0xC0 == 0x80:
        begin += 1  # the last character goes on
    return begin


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
