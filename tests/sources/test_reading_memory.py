"""Peak memory of a process that reads giant documents and row groups: ceilings in MB, of which some 75 are imports.

Measured on two busy cores: a JSON line, a .txt and a .txt.gz of 1 GB 1,092 to 1,143 MB; from fetched bytes 2,096; one
parquet cell of 1 GB 2,075 (uncompressed, no dictionary) to 3,427 (both); a row group of 2.2 GB 194 to 563, by the size
of its pages and its dictionary; a plan's items of 128 MB 248, fetched 416.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.fixtures import ROOT

pytestmark = pytest.mark.slow

GIGABYTE = 1_000_000_000


def block(size: int, *, special: str = 'é日🙂"\\\n') -> str:
    choose = random.Random(0)
    words = ["".join(choose.choices("etaoinshrdlu", k=choose.randrange(2, 9))) for _ in range(2000)]
    text = ""
    while len(text) < size:
        text += " ".join(choose.choices(words, k=1000)) + special
    return text[:size]


def read_alone(path: Path, mode: str = "file", item_bytes: int = 10**12) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.reading_process", str(path), mode, str(item_bytes)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)
    path.unlink()
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def open_gz(path: Path) -> Any:
    return gzip.open(path, "wb", compresslevel=1)


def open_plain(path: Path) -> BinaryIO:
    return path.open("wb")


@pytest.mark.parametrize(
    ("name", "opener", "mode", "ceiling_mb"),
    [
        ("a.jsonl", open_plain, "file", 1250),
        ("a.jsonl", open_plain, "fetched", 2250),
        ("a.jsonl.gz", open_gz, "file", 1250),
        ("a.txt", open_plain, "file", 1200),
        ("a.txt.gz", open_gz, "file", 1200),
    ],
)
def test_a_document_of_one_gigabyte(
    tmp_path: Path, name: str, opener: Callable[[Path], Any], mode: str, ceiling_mb: int
) -> None:
    text = block(1_000_000)
    is_json = ".jsonl" in name
    part = json.dumps(text, ensure_ascii=False)[1:-1].encode() if is_json else text.encode()
    repeats = (GIGABYTE - 1000) // len(part)
    with opener(tmp_path / name) as file:
        file.write(b'{"id": 1, "text": "' if is_json else b"")
        for _ in range(repeats):
            file.write(part)
        file.write(b'"}\n{"text": "after"}\n' if is_json else b"")
    figures = read_alone(tmp_path / name, mode)
    assert figures["text_bytes"] == repeats * len(text.encode()) + (len("after") if is_json else 0)
    assert figures["peak_mb"] < ceiling_mb, figures


@pytest.mark.parametrize(
    ("options", "ceiling_mb"),
    [({"compression": "none", "use_dictionary": False}, 2250), ({"compression": "zstd"}, 3600)],
)
def test_a_parquet_cell_of_one_gigabyte(tmp_path: Path, options: dict[str, Any], ceiling_mb: int) -> None:
    """Arrow holds a page, what it decompresses to, its dictionary and the array."""
    table = pa.table({"text": pa.array([block(1_000_000, special="\n") * 1000, "after"], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False, **options)
    del table
    figures = read_alone(tmp_path / "a.parquet")
    assert (figures["documents"], figures["text_bytes"]) == (2, GIGABYTE + 5)
    assert figures["peak_mb"] < ceiling_mb, figures


@pytest.mark.parametrize("column", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize(
    ("distinct", "options", "ceiling_mb"),
    [
        (1100, {"compression": "none", "use_dictionary": False}, 700),
        (1100, {"compression": "zstd", "use_dictionary": False}, 700),
        (1100, {"compression": "zstd"}, 700),  # begins with a dictionary, goes on without
        (5, {"compression": "zstd"}, 300),  # 0.5 MB in the file
    ],
)
def test_a_row_group_of_two_gigabytes(
    tmp_path: Path, column: pa.DataType, distinct: int, options: dict[str, Any], ceiling_mb: int
) -> None:
    body = block(99_994, special="\n")
    texts = pa.array([f"{number:06}{body}" for number in range(distinct)], column)
    table = pa.table({"text": pa.chunked_array([texts] * (22_000 // distinct), column)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10**6, **options)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    figures = read_alone(tmp_path / "a.parquet")
    assert (figures["documents"], figures["text_bytes"]) == (22_000, 2_200_000_000)
    assert figures["largest_array"] <= 16_000_000
    assert figures["peak_mb"] < ceiling_mb, figures


@pytest.mark.parametrize(("mode", "ceiling_mb"), [("file", 350), ("fetched", 550)])
def test_items_of_an_ordinary_file(tmp_path: Path, mode: str, ceiling_mb: int) -> None:
    """250 MB in row groups of 3 MB, two items."""
    body = block(3000)
    texts = [f"{number:09}{body}" for number in range(1000)]
    table = pa.table({"text": pa.chunked_array([texts] * 80, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="zstd")
    figures = read_alone(tmp_path / "a.parquet", mode, 128_000_000)
    assert (figures["documents"], figures["items"]) == (80_000, 2)
    assert figures["peak_mb"] < ceiling_mb, figures
