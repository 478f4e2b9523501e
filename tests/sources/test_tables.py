"""Tables that are read whole: .csv and .tsv against Python's writer, .arrow and .feather as libraries write them."""

from __future__ import annotations

import csv
import gzip
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import find
from tests.support.texts import TEXTS, mistake, read, read_items

HARD = [*TEXTS, 'a "quoted", word', "two\nlines\r\nand a third", "tab\there", "'", '"', "x" * 3_000_000]


def write_csv(path: Path, rows: list[tuple[Any, ...]], **options: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_separated_values(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_csv(path, [("id", "text", "x"), *((n, text, "") for n, text in enumerate(HARD))], delimiter=delimiter)
    assert read(tmp_path) == HARD
    (tmp_path / f"b.{suffix}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    assert read(tmp_path) == HARD * 2


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\r\n1,one\r\n2\r\n\r\n3,\r\n4, \r\n5,five\r\n")
    (tmp_path / "b.csv").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert read(tmp_path, skipped=skipped) == ["one", "five"]
    assert skipped == {"null": 1, "blank": 2}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id,body\n1,a\n", "a.csv has no column 'text', only id, body; name one with --text_column"),
        (b'text\n"open', "line 2 of .*a.csv cannot be read: unexpected end of data"),
        (b'text\n"a"b\n', "line 2 of .*a.csv cannot be read"),
        (b"text\na\xffb\n", "a.csv is not UTF-8 text behind its line 0: byte 0xff"),
    ],
)
def test_bad_values(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    kind = DamagedInputError if b"text" in content else UserError
    assert re.search(sentence, mistake(tmp_path, kind=kind))


@pytest.mark.parametrize(
    "arrow_type", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("form", ["stream", "file", "feather"])
def test_arrow(tmp_path: Path, form: str, arrow_type: pa.DataType) -> None:
    texts = [*TEXTS, None, ""]
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string()).cast(arrow_type)})
    if form == "feather":
        pyarrow.feather.write_feather(table, tmp_path / "a.feather", compression="zstd")
    else:
        new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with new(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
            writer.write_table(table.slice(0, 0))
    skipped: Counter[str] = Counter()
    assert read(tmp_path, skipped=skipped) == TEXTS
    assert skipped == {"null": 1, "blank": 1}
    assert "has no column 'body', only id, text" in mistake(tmp_path, text_column="body")
    assert "holds int64, not text" in mistake(tmp_path, text_column="id")


def test_bad_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrow").read_bytes()
    for content in (b"", b"nonsense, not arrow", whole[: len(whole) // 2], whole.replace(b"onetwo", b"one\xff\xffo")):
        (tmp_path / "a.arrow").write_bytes(content)
        assert "a.arrow cannot be read, it may be damaged" in mistake(tmp_path, kind=DamagedInputError)
    (tmp_path / "a.arrow").write_bytes(b"FEA1" + bytes(100))
    assert "is of the first version of Feather" in mistake(tmp_path, kind=DamagedInputError)


@pytest.mark.parametrize("limit", [1, 3, 4, 6, 9])
def test_limits_count_rows(tmp_path: Path, limit: int) -> None:
    write_csv(tmp_path / "a.csv", [("text",), ("1\n1",), ("2",), ("3",)])
    with pa.ipc.new_stream(tmp_path / "b.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["4", "5"]}))
        writer.write_table(pa.table({"text": ["6"]}))
    items = make_plan(find(str(tmp_path)).layouts("text"), text_column="text", item_bytes=10**6, limit_documents=limit)
    assert read_items(items) == ["1\n1", "2", "3", "4", "5", "6"][:limit]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv", "a.jsonl.gz", "a.arrow"])
def test_a_git_lfs_pointer_says_what_it_is(tmp_path: Path, name: str) -> None:
    digest = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n")
    sentence = f"{tmp_path}/{name} is a git-LFS pointer, not the file itself; run git lfs pull where it was cloned"
    assert mistake(tmp_path, kind=DamagedInputError) == sentence


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.jsonl.gz", "a.arrow", "a.json.zst"])
def test_a_web_page_says_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n<!DOCTYPE html>\n<html><body>Please log in</body></html>" + " " * 2000)
    assert "is a web page (HTML), such as a login page, not the file" in mistake(tmp_path, kind=DamagedInputError)


def test_packed_data_without_the_suffix_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert "a.jsonl is gzip data; add .gz to its name" in mistake(tmp_path, kind=DamagedInputError)
