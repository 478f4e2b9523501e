"""Copies of documents: against a set of texts, for any cut into items and any number of partitions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deduplication import exact


def reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda start, stop: content[start:stop]


def hashes_of(texts: list[str], array_type: pa.DataType) -> bytes:
    half = len(texts) // 2
    arrays = [pa.array(part, array_type) for part in (texts[:half], texts[half:])]
    return exact.hashes_to_bytes(b"".join(exact.hash_documents(array) for array in arrays))


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(st.lists(st.text("ab", max_size=3), max_size=12), min_size=1, max_size=5),
    partitions=st.sampled_from([1, 2, 8, 256]),
    array_type=st.sampled_from([pa.string(), pa.large_string()]),
)
def test_the_first_of_equal_documents_stays(items: list[list[str]], partitions: int, array_type: pa.DataType) -> None:
    files = [reader(hashes_of(texts, array_type)) for texts in items]
    found = [reader(exact.find_duplicates(files, p, partitions)) for p in range(partitions)]
    seen: set[str] = set()
    for index, texts in enumerate(items):
        rows = exact.rows_of_item(found, index, len(items))
        assert rows.tolist() == sorted(set(rows.tolist()))
        arrays = [pa.array(texts[:2], array_type), pa.array([], array_type), pa.array(texts[2:], array_type)]
        kept = [text for array in exact.without_rows(arrays, rows) for text in array.to_pylist()]
        expected = [text for text in dict.fromkeys(texts) if text not in seen]
        assert kept == expected
        assert len(rows) == len(texts) - len(expected)
        seen.update(texts)


def test_partitions_hold_their_share_of_the_hashes() -> None:
    texts = [f"document {number}" for number in range(5_000)]
    content = hashes_of(texts, pa.large_string())
    assert exact.num_documents(len(content)) == 5_000
    for partitions in (1, 4, 256):
        sizes = []
        for partition in range(partitions):
            width = 256 // partitions
            part = exact._read_partition(reader(content), partition * width, (partition + 1) * width)
            sizes.append(len(part))
            halves = {(int(record["high"]), int(record["low"])) for record in part}
            assert {high >> 56 for high, _ in halves} <= set(range(partition * width, (partition + 1) * width))
        assert sum(sizes) == 5_000
    digest = hashlib.sha256(b"document 77").digest()
    record = next(r for r in exact._read_partition(reader(content), 0, 256) if r["row"] == 77)
    assert int(record["high"]).to_bytes(8, "big") + int(record["low"]).to_bytes(8, "big") == digest[:16]


def test_equal_first_halves_are_not_copies() -> None:
    """A hash that agrees in its first 8 bytes only: made by hand, nobody can find such texts."""
    hashes = bytes(16) + bytes(15) + b"\1" + bytes(16)
    found = exact.find_duplicates([reader(exact.hashes_to_bytes(hashes))], 0, 1)
    assert exact.rows_of_item([reader(found)], 0, 1).tolist() == [2]


@pytest.mark.parametrize(
    ("documents", "partitions"), [(0, 1), (4_000_000, 1), (4_000_001, 2), (13_000_000, 4), (10**9, 256), (10**11, 256)]
)
def test_number_of_partitions(documents: int, partitions: int) -> None:
    assert exact.num_partitions(documents) == partitions


def test_sliced_arrays_are_hashed_as_they_read() -> None:
    array = pa.array(["x", "żółw", "", "y", "z"], pa.large_string()).slice(1, 3)
    expected = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in ["żółw", "", "y"])
    assert exact.hash_documents(array) == expected
    assert exact.hash_documents(pa.array([], pa.string())) == b""
    assert np.frombuffer(exact.hashes_to_bytes(b""), "<i8").tolist() == [0] * 257
