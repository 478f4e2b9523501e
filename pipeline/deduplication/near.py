"""Near-duplicates of a whole source, stage by stage: each stage writes a file that the next one reads.

A document has a position, its work item times 2**32 plus its number in the item: positions ascend in plan order.
Signatures (minhash.sign) are written for every item. The keys of all documents are divided into partitions, and in each
one documents with the same key make pairs (``find_pairs``). All pairs together make components, of which the document
with the smallest position stays (``find_copies``): neither the order of the work nor the number of workers has a say.

On disk a document takes 12 bytes for each band, and with an exact check 4 for each word; a pair takes 16. A search for
pairs holds some 100 bytes for each key of its partition, the search for components 24 for each document in a pair, and
one partition's pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.deduplication import exact, minhash
from pipeline.deduplication.kernels import components as kernels
from pipeline.deduplication.minhash import Halves, Keys
from pipeline.deduplication.shingles import Ends

SIGNATURES = "items/signatures/"
SHINGLES = "items/shingles/"
PAIRS = "items/pairs/"
_KEYS_PER_PARTITION = 2_000_000
_TOP_BITS = 12
MAX_PARTITIONS = 1 << _TOP_BITS
MAX_LEADERS = 100
_RECORD = np.dtype([("key", "<u8"), ("row", "<u4")])
_HEADER_BYTES = 8 * (MAX_PARTITIONS + 1)
_ROW_BITS = 32
_SHINGLES_IN_MEMORY = 4096  # documents whose shingles an exact check keeps, 10 MB at 600 words each

Positions = npt.NDArray[np.int64]
Pairs = npt.NDArray[np.int64]
"""(n, 2) positions of documents that are alike, the smaller one first."""
ReadRange = Callable[[int, int], bytes]
ReadShingles = Callable[[int], Halves]


def signatures_name(index: int) -> str:
    """The file of a work item's keys in the output folder."""
    return f"{SIGNATURES}{index:06d}"


def shingles_name(index: int) -> str:
    """The file of a work item's shingles, which an exact check needs."""
    return f"{SHINGLES}{index:06d}"


def pairs_name(partition: int) -> str:
    """The file of the pairs found in a partition."""
    return f"{PAIRS}{partition:04d}"


def num_partitions(num_keys: int) -> int:
    """A power of two up to 4,096: as few partitions as hold two million keys each, if that is enough of them."""
    wanted = max(1, -(-num_keys // _KEYS_PER_PARTITION))
    return min(MAX_PARTITIONS, 1 << (wanted - 1).bit_length())


# ---- keys on disk ----------------------------------------------------------------------------------------------------


def keys_to_bytes(keys: Keys) -> bytes:
    """The file of an item's signatures: offsets by the top 12 bits (4,097 int64), then keys with rows in order of keys.

    keys: (documents, bands). A document without a word, whose keys are 0, is in no record.
    """
    flat = keys.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat[order], 1) :]
    records = np.empty(len(order), _RECORD)
    records["key"], records["row"] = flat[order], order // max(1, keys.shape[1])
    tops = (records["key"] >> np.uint64(64 - _TOP_BITS)).astype(np.int64)
    return np.searchsorted(tops, np.arange(MAX_PARTITIONS + 1)).astype("<i8").tobytes() + records.tobytes()


def num_keys(signatures_bytes: int) -> int:
    """Number of keys in a file of signatures of that size."""
    return max(0, signatures_bytes - _HEADER_BYTES) // _RECORD.itemsize


def read_partition(files: Sequence[ReadRange], partition: int, partitions: int) -> tuple[Keys, Positions]:
    """The keys of all items that lie in a partition, and the position of each.

    files: for every item, in plan order, a function that reads bytes [start, stop) of its file of signatures.
    """
    width = MAX_PARTITIONS // partitions
    keys, positions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for item, read in enumerate(files):
        offsets = np.frombuffer(read(8 * partition * width, 8 * (partition + 1) * width + 8), "<i8")
        begin, end = (_HEADER_BYTES + int(offset) * _RECORD.itemsize for offset in (offsets[0], offsets[-1]))
        records = np.frombuffer(read(begin, end) if end > begin else b"", _RECORD)
        keys.append(records["key"].astype(np.uint64))
        positions.append((np.int64(item) << _ROW_BITS) + records["row"].astype(np.int64))
    return np.concatenate(keys), np.concatenate(positions)


# ---- shingles on disk, for an exact check ----------------------------------------------------------------------------


def shingle_sets(shingles: Halves, ends: Ends) -> list[Halves]:
    """The shingles of every document, ascending and each once."""
    return [np.unique(part) for part in np.split(shingles, ends[:-1])] if len(ends) else []


def shingles_to_bytes(sets: Sequence[Halves]) -> bytes:
    """The file of an item's shingles: where those of each document begin (int64, one more than documents), then all."""
    offsets = 8 * (len(sets) + 1) + 4 * np.cumsum([0, *map(len, sets)], dtype="<i8")
    return offsets.tobytes() + b"".join(part.astype("<u4").tobytes() for part in sets)


def shingle_reader(files: Sequence[ReadRange]) -> ReadShingles:
    """A function from the position of a document to its shingles; the latest 4,096 documents are kept in memory.

    files: for every item, in plan order, a function that reads bytes [start, stop) of its file of shingles.
    """

    @functools.lru_cache(maxsize=_SHINGLES_IN_MEMORY)
    def read(position: int) -> Halves:
        item, row = position >> _ROW_BITS, position & ((1 << _ROW_BITS) - 1)
        begin, end = np.frombuffer(files[item](8 * row, 8 * row + 16), "<i8").tolist()
        return np.frombuffer(files[item](begin, end) if end > begin else b"", "<u4")

    return read


# ---- pairs and components --------------------------------------------------------------------------------------------


def find_pairs(keys: Keys, positions: Positions, check: Callable[[Positions], Pairs] | None = None) -> Pairs:
    """The pairs of documents with a key in common, each pair once, ascending.

    Without ``check`` each of the documents with a key is paired with the first of them, which is enough for the
    components; ``check`` makes the pairs of a bucket (``similar_pairs``).
    """
    order = np.lexsort((positions, keys))
    keys, positions = keys[order], positions[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(begins, len(keys)))
    if check is None:
        firsts = np.repeat(positions[begins], sizes)
        is_other = firsts != positions
        pairs = np.stack([firsts[is_other], positions[is_other]], axis=1)
    else:
        shared = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True) if size > 1]
        buckets = {positions[begin:end].tobytes() for begin, end in shared}  # bands often find the same ones
        found = [check(np.frombuffer(bucket, np.int64)) for bucket in sorted(buckets)]
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return np.unique(pairs, axis=0)


def similar_pairs(bucket: Positions, read: ReadShingles, threshold: float) -> Pairs:
    """The pairs of a bucket whose similarity is at least ``threshold``.

    Every document, in plan order, is compared with the leaders: those before it that were like no leader. With 100
    leaders there are no more, so that a bucket of any size takes a bounded number of comparisons a document.
    """
    leaders: list[int] = []
    pairs: list[tuple[int, int]] = []
    for position in bucket.tolist():
        own = read(position)
        alike = [leader for leader in leaders if minhash.similarity(read(leader), own) >= threshold]
        pairs += [(leader, position) for leader in alike]
        if not alike and len(leaders) < MAX_LEADERS:
            leaders.append(position)
    return np.array(pairs, np.int64).reshape(-1, 2)


def find_components(parts: Callable[[], Iterable[Pairs]]) -> tuple[Positions, Positions]:
    """All documents that are in a pair, ascending, and the first document of the component of each.

    parts: goes through all pairs, some at a time; it is called twice.
    """
    nodes = np.zeros(0, np.int64)
    for pairs in parts():
        nodes = np.union1d(nodes, pairs)
    parents = np.arange(len(nodes), dtype=np.int64)
    for pairs in parts():
        firsts, seconds = (np.searchsorted(nodes, pairs[:, column]).astype(np.int64) for column in (0, 1))
        kernels.join_pairs(parents, firsts, seconds)
    roots = np.empty_like(parents)
    kernels.find_roots(parents, roots)
    return nodes, nodes[roots]


def find_copies(parts: Callable[[], Iterable[Pairs]], num_items: int) -> bytes:
    """All documents but the first of every component, as a file (``exact.rows_to_bytes``)."""
    nodes, firsts = find_components(parts)
    copies = nodes[nodes != firsts]
    return exact.rows_to_bytes(copies >> _ROW_BITS, copies & ((1 << _ROW_BITS) - 1), num_items)


def pairs_from_bytes(content: bytes) -> Pairs:
    """The pairs in a partition's file."""
    return np.frombuffer(content, "<i8").reshape(-1, 2).astype(np.int64)


def pairs_to_bytes(pairs: Pairs) -> bytes:
    """The file of a partition's pairs: (n, 2) int64."""
    return np.ascontiguousarray(pairs, "<i8").tobytes()


def warm_up() -> None:
    """Compile the kernels unless they are cached. A driver calls it before its workers start."""
    minhash.warm_up()
    pair: Any = np.array([[0, 1]], np.int64)
    find_components(lambda: [pair])
