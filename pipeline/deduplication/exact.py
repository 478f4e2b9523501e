"""Exact deduplication: documents of a source that are copies of an earlier one, for any number of workers.

A document is known by the first 16 bytes of the sha256 of its UTF-8 text. Of equal documents the first in plan order
stays. Three steps: every work item's hashes are written, in the order of the hashes (``hashes_to_bytes``); every
partition of the hash space is searched on its own (``find_duplicates``); encoding leaves out what was found
(``without_rows``). A hash takes 20 bytes on disk, and some 100 bytes of memory in the search, of which each of P
partitions holds its share: with 256 partitions a billion documents take 0.4 GB a search, and 20 GB of disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.sources.arrow_values import values_of

HASHES = "items/hashes/"
DUPLICATES = "items/duplicates/"
MAX_PARTITIONS = 256
_DOCUMENTS_PER_PARTITION = 4_000_000
_RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("row", "<u4")])  # big-endian: in the order of the bytes
_OFFSETS = np.dtype("<i8")
_HEADER_BYTES = (MAX_PARTITIONS + 1) * _OFFSETS.itemsize

Rows = npt.NDArray[np.int64]
ReadRange = Callable[[int, int], bytes]


def hashes_name(index: int) -> str:
    """The file of a work item's hashes in the output folder."""
    return f"{HASHES}{index:06d}"


def duplicates_name(partition: int) -> str:
    """The file of the copies found in a partition."""
    return f"{DUPLICATES}{partition:03d}"


def num_documents(hashes_bytes: int) -> int:
    """Number of documents in a file of hashes of that size."""
    return (hashes_bytes - _HEADER_BYTES) // _RECORD.itemsize


def hash_documents(array: pa.Array) -> bytes:
    """The hashes of all documents, 16 bytes each."""
    texts = array.cast(pa.large_string())
    return b"".join(hashlib.sha256(text).digest()[:16] for text in values_of(texts))


def hashes_to_bytes(hashes: bytes) -> bytes:
    """The file of an item's hashes: offsets by first byte (257 int64), then the records in the order of the hashes."""
    halves = np.frombuffer(hashes, dtype=[("high", ">u8"), ("low", ">u8")])
    records = np.zeros(len(halves), _RECORD)
    records["high"], records["low"], records["row"] = halves["high"], halves["low"], np.arange(len(halves))
    ordered = records[np.argsort(records["high"], kind="stable")]
    first_bytes = (ordered["high"].astype(np.uint64) >> np.uint64(56)).astype(np.int64)
    offsets = np.searchsorted(first_bytes, np.arange(MAX_PARTITIONS + 1)).astype(_OFFSETS)
    return offsets.tobytes() + ordered.tobytes()


def num_partitions(num_documents: int) -> int:
    """A power of two up to 256: as few partitions as hold 4 million documents each, if that is enough of them."""
    wanted = max(1, -(-num_documents // _DOCUMENTS_PER_PARTITION))
    return min(MAX_PARTITIONS, 1 << (wanted - 1).bit_length())


def find_duplicates(files: Sequence[ReadRange], partition: int, partitions: int) -> bytes:
    """The copies whose hash is in a partition, as a file: offsets by item (int64), then the row numbers (u4).

    files: for every item, in plan order, a function that reads bytes [start, stop) of its hashes.
    """
    width = MAX_PARTITIONS // partitions
    parts = [_read_partition(read, partition * width, (partition + 1) * width) for read in files]
    sizes = [len(part) for part in parts]
    records = np.concatenate(parts) if parts else np.zeros(0, _RECORD)
    items = np.repeat(np.arange(len(files), dtype=np.int64), sizes)
    high, low = records["high"].astype(np.uint64), records["low"].astype(np.uint64)
    order = np.lexsort((records["row"], items, low, high))
    is_copy = np.zeros(len(records), bool)
    is_copy[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    copies = order[is_copy]
    return rows_to_bytes(items[copies], records["row"][copies], len(files))


def rows_to_bytes(items: Rows, rows: npt.NDArray[Any], num_items: int) -> bytes:
    """The documents to leave out, row rows[i] of items[i], as a file: offsets by item (int64), then the rows (u4)."""
    by_item = np.lexsort((rows, items))
    offsets = np.searchsorted(items[by_item], np.arange(num_items + 1)).astype(_OFFSETS)
    return offsets.tobytes() + rows[by_item].astype("<u4").tobytes()


def _read_partition(read: ReadRange, first: int, stop: int) -> npt.NDArray[Any]:
    offsets = np.frombuffer(read(first * _OFFSETS.itemsize, (stop + 1) * _OFFSETS.itemsize), _OFFSETS)
    begin, end = (_HEADER_BYTES + int(offset) * _RECORD.itemsize for offset in (offsets[0], offsets[-1]))
    return np.frombuffer(read(begin, end) if end > begin else b"", _RECORD)


def rows_of_item(files: Sequence[ReadRange], item: int, num_items: int) -> Rows:
    """The numbers, ascending, of the documents of an item that are copies, by the files of all partitions."""
    found = []
    for read in files:
        begin, end = np.frombuffer(read(item * _OFFSETS.itemsize, (item + 2) * _OFFSETS.itemsize), _OFFSETS).tolist()
        base = (num_items + 1) * _OFFSETS.itemsize
        found.append(np.frombuffer(read(base + begin * 4, base + end * 4) if end > begin else b"", "<u4"))
    return np.sort(np.concatenate(found)).astype(np.int64) if found else np.zeros(0, np.int64)


def without_rows(
    arrays: Iterable[pa.Array], rows: Rows, keep: Callable[[npt.NDArray[np.bool_]], None] | None = None
) -> Iterator[pa.Array]:
    """The same arrays without the documents numbered ``rows`` (ascending, over all arrays).

    keep: is told which documents of an array are kept, where it is not all, before they are handed on.
    """
    first = 0
    for array in arrays:
        begin, end = np.searchsorted(rows, [first, first + len(array)])
        if end > begin:
            is_kept = np.ones(len(array), bool)
            is_kept[rows[begin:end] - first] = False
            if keep:
                keep(is_kept)
            yield array.filter(pa.array(is_kept))
        else:
            yield array
        first += len(array)
