"""Which column holds the text: exact names first, names inside others, several joined; in every kind of file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.text_columns import num_leaves
from tests.sources.test_readers import as_remote, open_local
from tests.support.texts import items_of, mistake, read_fetched, read_items

ROWS: list[dict[str, Any]] = [
    {"data.text": "dotted", "data": {"text": "in", "n": [1], "more": {"text": "deep"}}, "title": "T1", "text": "B1"},
    {"data.text": None, "data": {"text": None, "n": None, "more": None}, "title": None, "text": "B2"},
    {"data.text": "x", "data": None, "title": " ", "text": "B3"},
    {"data.text": "", "data": {"text": "n4", "n": [], "more": {"text": "d4"}}, "title": "T4", "text": None},
    {"data.text": "y", "data": {"text": "n5", "n": [3], "more": {"text": None}}, "title": None, "text": None},
]
EXPECTED = {
    "text": ["B1", "B2", "B3"],
    "data.text": ["dotted", "x", "y"],
    "data.more.text": ["deep", "d4"],
    "title,text": ["T1\n\nB1", "B2", "B3", "T4"],
    "text, title": ["B1\n\nT1", "B2", "B3", "T4"],
    "title,data.more.text": ["T1\n\ndeep", "T4\n\nd4"],
}


def write_rows(folder: Path, kind: str, *, nested_first: bool = False) -> Path:
    rows = [dict(sorted(row.items(), key=lambda entry: entry[0] != "data")) if nested_first else row for row in ROWS]
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        pyarrow.feather.write_feather(table, path)
    return path


@pytest.mark.parametrize("text_column", EXPECTED)
@pytest.mark.parametrize("nested_first", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_the_same_texts_in_every_kind(tmp_path: Path, kind: str, nested_first: bool, text_column: str) -> None:
    write_rows(tmp_path, kind, nested_first=nested_first)
    items = items_of(tmp_path, text_column=text_column)
    assert read_items(items) == read_fetched(as_remote(items), open_local) == EXPECTED[text_column]


def test_a_nested_column_where_no_dotted_one_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [{"text": "one"}, None], "b": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"a": {"text": "two"}}\n{"a": null}\n', encoding="utf-8")
    skipped: Counter[str] = Counter()
    assert read_items(items_of(tmp_path, text_column="a.text"), skipped=skipped) == ["one", "two"]
    assert skipped == {"null": 2}


@pytest.mark.parametrize("giant", [False, True])
def test_several_keys_of_giant_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, giant: bool) -> None:
    if giant:
        for name in ("_GIANT_BYTES", "_LITERAL_BYTES"):
            monkeypatch.setattr(f"pipeline.sources.json_lines.{name}", 20)
    rows = [{"title": "t" * 30, "text": "b\n" * 30}, {"title": "0", "text": "c" * 40}, {"title": " " * 50, "text": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = ["t" * 30 + "1|" + "b\n" * 30, "01|" + "c" * 40, "d"]
    assert read_items(items_of(tmp_path, text_column="title,text", column_separator="1|")) == expected


def test_csv_columns_joined(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('title,id,text\nT1,1,"B,1"\n,2,B2\nT3\n', encoding="utf-8")
    assert read_items(items_of(tmp_path, text_column="title,text")) == ["T1\n\nB,1", "B2", "T3"]


@pytest.mark.parametrize(
    ("text_column", "message"),
    [
        ("body", "has no column 'body', only id, data, pair"),
        ("data", "not text, in its column 'data'; name what is in it with --text_column"),
        ("data.n", "holds int64, not text, in its column 'data.n'"),
        ("data.list.element", "has no column 'data.list.element'"),
        ("text,body", "has no column 'text'"),
        ("id", "holds int64, not text, in its column 'id'"),
    ],
)
def test_columns_without_text(tmp_path: Path, text_column: str, message: str) -> None:
    table = pa.table({"id": [1], "data": [{"n": 1, "list": ["a"]}], "pair": ["a"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert message in mistake(tmp_path, text_column=text_column)
    damaged: list[dict[str, str]] = []
    assert list(find(str(tmp_path)).layouts(text_column, damaged=damaged)) == []
    assert [entry["name"] for entry in damaged] == ["a.parquet"] and message in damaged[0]["reason"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
def test_two_columns_of_one_name_are_one_sentence(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "other"])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("text,text,other\na,b,c\n", encoding="utf-8")
    assert "has 2 columns named 'text', and it is not known which" in mistake(tmp_path)
    assert read_items(items_of(tmp_path, text_column="other")) == ["c"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_of_nothing_but_nulls(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": pa.nulls(3), "title": ["a", "b", None]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        pyarrow.feather.write_feather(table, tmp_path / "a.arrow")
    skipped: Counter[str] = Counter()
    assert read_items(items_of(tmp_path), skipped=skipped) == [] and skipped == {"null": 3}
    assert read_items(items_of(tmp_path, text_column="title,text")) == ["a", "b"]


def test_numbers_and_halves_of_characters_are_no_reason_to_lose_a_line(tmp_path: Path) -> None:
    digits = "9" * 5000
    lines = [f'{{"n": {digits}, "text": "a"}}', f'{{"text": -{digits}}}', '{"text": "b\\ud83d"}', '{"text": ["c"]}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"n": 1}', "[1]", '{"text": "e"}']), encoding="utf-8")
    (item,) = items_of(tmp_path)
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    texts = [text for array in read_item(item, skipped, None, None, first) for text in array.to_pylist()]
    assert texts == ["a", "b\ufffd", "e"]
    assert skipped == {"not text": 2, "without the key": 1, "not JSON": 1}
    assert first["not text"].startswith("line 2 of a.jsonl has a int under 'text', not text")
    assert first["without the key"] == "line 5 of a.jsonl has no key 'text', only n; name one with --text_column"
    with pytest.raises(UserError, match="line 2 of"):
        list(read_item(item, Counter()))


def test_leaves_of_a_schema_are_counted_as_parquet_does(tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": [{"x": [1], "y": {"z": "q", "w": [{"u": 1.0, "v": "s"}]}}],
            "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "d": pa.array(["t"]).dictionary_encode(),
            "f": pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
            "n": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    schema = metadata.schema.to_arrow_schema()
    assert sum(num_leaves(field.type) for field in schema) == len(metadata.schema)
