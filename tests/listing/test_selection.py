"""The rule for names: what is read, as what, and what is counted under which reason."""

from __future__ import annotations

import pytest

from pipeline.listing.selection import compression_of, kind_of, mixture, select


def split(*names: str, pattern: str = "") -> tuple[list[str], dict[str, int]]:
    """Names that are read, and the number of files that are not, by the first word of the reason."""
    selection = select(names, pattern)
    return list(selection.kinds), {entry.reason.partition(" ")[0]: entry.files for entry in selection.ignored}


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.parquet", "parquet", None),
        ("A.Parquet", "parquet", None),
        ("a.snappy.parquet", "parquet", None),
        ("a.parquet.gz", None, "gzip"),
        ("a.jsonl", "jsonl", None),
        ("a.JSONL.GZ", "jsonl", "gzip"),
        ("a.json.zstd", "jsonl", "zstd"),
        ("a.ndjson.zst", "jsonl", "zstd"),
        ("a.txt.bz2", "txt", "bz2"),
        ("a.txt.xz", "txt", "xz"),
        ("a.csv", "csv", None),
        ("a.TSV.xz", "tsv", "xz"),
        ("a.arrow", "arrow", None),
        ("a.feather", "arrow", None),
        ("a.arrow.zst", None, "zstd"),
        ("a.txt.gz.gz", None, "gzip"),
        ("a.jsonl.lz4", None, None),
        ("a.md", None, None),
        ("gz", None, None),
        ("a.gz", None, "gzip"),
        ("txt", None, None),
    ],
)
def test_kinds_are_told_by_suffixes(name: str, kind: str | None, compression: str | None) -> None:
    assert (kind_of(name), compression_of(name)) == (kind, compression)


def test_text_beside_tables_is_no_document() -> None:
    names = ("LICENSE.txt", "notes.txt", "dataset_infos.json", "data/a.parquet", "data/b.csv", "other/c.txt", "x.json")
    assert split(*names) == (["data/a.parquet", "data/b.csv", "other/c.txt"], {"about": 2, "text": 2})
    assert split("a.arrow", "state.json", "dataset_info.json", "cache-0af3.arrow") == (["a.arrow"], {"about": 3})
    assert split(*names, pattern="*.txt") == (["LICENSE.txt", "notes.txt"], {})
    assert split("LICENSE.txt", "a.txt") == (["LICENSE.txt", "a.txt"], {})


def test_a_mixture_is_read_and_said() -> None:
    assert split("a.jsonl", "b.parquet", "c.txt", "LICENSE.txt") == (["a.jsonl", "b.parquet", "c.txt"], {"about": 1})
    assert "1 text files (such as c.txt)" in str(mixture({"a.jsonl": "jsonl", "c.txt": "txt"}))
    assert mixture({"a.jsonl": "jsonl"}) is mixture({"c.txt": "txt"}) is None


def test_every_name_is_read_or_counted() -> None:
    read, counted = split("a.txt", "b.MD", ".git/x", ".git/y", "_SUCCESS", "d/_tmp/a.txt", "e.txt.lz4")
    assert read == ["a.txt"] and counted == {"hidden": 3, "of": 2}
