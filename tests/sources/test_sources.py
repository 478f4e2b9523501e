"""Sources: which files a name stands for, where each can be divided, what is wrong with them in one sentence."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.selection import KNOWN
from pipeline.sources.plan import make_plan, save_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import Input, find
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.s3_server import S3
from tests.support.texts import (
    TEXTS,
    items_of,
    json_lines,
    mistake,
    read,
    read_fetched,
    read_items,
    write_parquet,
    zstd,
)


def layouts(source: Path | str, **options: Any) -> list[tuple[str, list[int], list[int], list[int] | None]]:
    """Name, bounds, sizes and documents of every file."""
    return [
        (
            layout.whole.name,
            layout.bounds.tolist(),
            layout.sizes.tolist(),
            None if layout.documents is None else layout.documents.tolist(),
        )
        for layout in find(str(source)).layouts("text", **options)
    ]


# ---- local files -----------------------------------------------------------------------------------------------------


def test_names_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("c.txt", "a.txt.gz", "deep/b.txt.zst", "b.ndjson", "notes.md", ".hidden.txt", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.txt").mkdir()

    def names(source: str) -> list[str]:
        return [entry.name for entry in find(source).inputs]

    assert names(str(tmp_path)) == ["a.txt.gz", "b.ndjson", "c.txt", "deep/b.txt.zst"]
    assert names(f"{tmp_path}/*.txt") == ["c.txt"]
    assert names(f"{tmp_path}/**/*.zst") == ["deep/b.txt.zst"]
    assert names(f"{tmp_path}/deep/b*") == ["b.txt.zst"]
    assert names(f"{tmp_path}/c.txt") == ["c.txt"]
    stat = (tmp_path / "c.txt").stat()
    assert find(f"{tmp_path}/c.txt").inputs == [Input(name="c.txt", size_bytes=1, mtime_ns=stat.st_mtime_ns)]


def test_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * 100, None, "y" * 100], compression="none")
    (tmp_path / "b.jsonl").write_bytes(b"{}\n" * 7)
    (tmp_path / "c.jsonl.gz").write_bytes(b"1234567")
    (tmp_path / "d.txt").write_bytes(b"abc")
    (tmp_path / "e.txt.zst").write_bytes(b"abc")
    (tmp_path / "f.jsonl").write_bytes(b"")
    monkeypatch.setattr("pipeline.sources.sources._RANGE_BYTES", 10)
    seen: list[int] = []
    (name, bounds, sizes, documents), *others = layouts(tmp_path, progress=lambda: seen.append(1))
    assert (name, bounds, documents) == ("a.parquet", [0, 1, 2], [2, 1])
    assert all(100 < size < 400 for size in sizes)  # the text and what the format adds
    assert others == [
        ("b.jsonl", [0, 10, 20, 21], [10, 10, 1], None),
        ("c.jsonl.gz", [0, 1], [21], None),
        ("d.txt", [0, 1], [3], [1]),
        ("e.txt.zst", [0, 1], [9], [1]),
        ("f.jsonl", [0], [], None),
    ]
    assert len(seen) == 6


def test_layouts_come_in_order_and_may_be_left(tmp_path: Path) -> None:
    for number in range(200):
        write_parquet(tmp_path / f"{number:03}.parquet", [f"{number}"] * (number % 5 + 1), row_group_size=10)
    assert [documents for _, _, _, documents in layouts(tmp_path)] == [[number % 5 + 1] for number in range(200)]
    (tmp_path / "150.parquet").write_bytes(b"damaged")
    source = find(str(tmp_path))
    some = source.layouts("text")
    assert [next(some).whole.name for _ in range(100)][-1] == "099.parquet"
    some.close()  # type: ignore[attr-defined]
    items = make_plan(source.layouts("text"), text_column="text", item_bytes=100, limit_documents=3)
    assert read_items(items) == ["0", "1", "1"]


def test_parquet_column_below_a_nested_one(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"meta": [{"text": 1, "b": 2}] * 3, "text": ["a" * 500, "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (item,) = items_of(tmp_path)
    assert item.size_bytes > 500
    assert read(tmp_path) == table["text"].to_pylist()


def test_nothing_there(tmp_path: Path) -> None:
    assert mistake(tmp_path / "absent") == f"source {tmp_path}/absent does not exist (looked for {tmp_path}/absent)"
    assert f"file matches the source {tmp_path}/*.parquet" in mistake(f"{tmp_path}/*.parquet")
    assert mistake(tmp_path) == f"no {KNOWN} file matches the source {tmp_path}"
    (tmp_path / "a.md").write_text("# a")
    assert "a.md is no .parquet" in mistake(tmp_path / "a.md")
    assert "what is there is not read: 1 of a format that is not read (such as a.md)" in mistake(tmp_path)
    assert "source ftp://host/a.parquet is none that can be read" in mistake("ftp://host/a.parquet")
    (tmp_path / "a.txt").write_text("")
    assert mistake(tmp_path) == "the source holds no text"


def test_parquet_without_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    assert "has no column 'body', only id, text; name one with --text_column" in mistake(tmp_path, text_column="body")
    assert "column 'id'" in mistake(tmp_path, text_column="id")
    assert "holds int64, not text" in mistake(tmp_path, text_column="id")


def test_bad_footers_are_noted_where_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", ["a"])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 damaged PAR1")
    damaged: list[dict[str, str]] = []
    assert [name for name, *_ in layouts(tmp_path, damaged=damaged)] == ["a.parquet", "c.parquet"]
    (entry,) = damaged
    assert entry["name"] == "b.parquet"
    assert f"{tmp_path}/b.parquet cannot be read, it may be damaged or truncated: " in entry["reason"]
    assert entry["reason"] == mistake(tmp_path, kind=DamagedInputError)
    source = find(str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DamagedInputError, match=r"a\.parquet is missing"):
        list(source.layouts("text", damaged=None))


@pytest.mark.parametrize("change", ["time", "size"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_file_that_changed_since_the_plan(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, ["one"])
    else:
        path.write_bytes(json_lines(["one"]))
    source = find(str(tmp_path))
    items = items_of(tmp_path)
    if change == "time":
        os.utime(path, ns=(0, 0))
    else:
        stat = path.stat()
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DamagedInputError, match=rf"{name} has changed since the plan was made"):
        read_items(items)
    if name == "a.parquet":
        with pytest.raises(DamagedInputError, match=r"has changed since the plan was made"):
            list(source.layouts("text"))


# ---- remote files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    write_parquet(tmp_path / "a.parquet", [*TEXTS])
    write_parquet(tmp_path / "b.parquet", ["b1", "b2", "b3"])
    return {
        "README.md": b"# no data",
        "data/b.parquet": (tmp_path / "b.parquet").read_bytes(),
        "data/a.parquet": (tmp_path / "a.parquet").read_bytes(),
        "more/c.jsonl": json_lines(["c1", "c2"]),
        "more/d.txt.zst": zstd(b"d1"),
    }


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    with running_hub(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_hub_data_set(hub: FakeHub) -> None:
    assert read(f"hf://datasets/{NAME}") == [*TEXTS, "b1", "b2", "b3", "c1", "c2", "d1"]
    assert read(f"hf://datasets/{NAME}@main/data") == [*TEXTS, "b1", "b2", "b3"]
    assert read(f"hf://datasets/{NAME}@refs%2Fconvert%2Fparquet/data/b*", item_bytes=1) == ["b1", "b2", "b3"]
    assert hub.tokens == {None}


def test_hub_plan_pins_the_commit(hub: FakeHub) -> None:
    source = find(f"hf://datasets/{NAME}/data")
    items = make_plan(source.layouts("text"), text_column="text", item_bytes=1)
    assert [item.label for item in items][:2] == ["data/a.parquet row groups 0-1", "data/a.parquet row groups 1-2"]
    assert [entry.version.partition(":")[0] for entry in source.inputs] == [f"{'a' * 40} sha256"] * 2
    assert source.pinned == f"hf://datasets/{NAME}@{'a' * 40}/data"
    hub.push("b" * 40, {"data/a.parquet": b"moved on"})
    assert read_items(items) == read_fetched(items) == [*TEXTS, "b1", "b2", "b3"]
    assert read(str(source.pinned)) == [*TEXTS, "b1", "b2", "b3"]


def test_hub_token_comes_from_the_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (item,) = items_of(f"hf://datasets/{NAME}/data/b.parquet")
    list(read_item(item, Counter()))
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in save_plan([item]).decode()


def test_hub_mistakes(hub: FakeHub) -> None:
    assert "file matches the source" in mistake(f"hf://datasets/{NAME}/absent/*.parquet")
    assert "has no column 'body'" in mistake(f"hf://datasets/{NAME}/data", text_column="body")
    hub.push("c" * 40, {"a.parquet": b"PAR1 damaged PAR1"})
    sentence = mistake(f"hf://datasets/{NAME}", kind=DamagedInputError)
    assert f"hf://datasets/{NAME}/a.parquet cannot be read, it may be damaged" in sentence


@pytest.mark.parametrize("item_bytes", [1, 100_000])
def test_bucket(s3: S3, files: dict[str, bytes], item_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.sources._RANGE_BYTES", 10)
    for name, content in files.items():
        s3.put(f"texts/{name}", content)
    items = items_of(f"{s3.url}/texts", item_bytes=item_bytes)
    assert len(items) == (1 if item_bytes > 1 else 3 + 2 + 5 + 1)
    assert read_items(items) == read_fetched(items) == [*TEXTS, "b1", "b2", "b3", "c1", "c2", "d1"]
    s3.put("texts/more/c.jsonl", json_lines(["x1", "x2"]))
    with pytest.raises(DamagedInputError, match=r"more/c\.jsonl has changed since"):
        read_items(items)
    with pytest.raises(DamagedInputError, match=r"more/c\.jsonl has changed since"):
        read_fetched(items)


def test_bucket_mistakes(s3: S3) -> None:
    assert "file matches the source" in mistake(f"{s3.url}/absent")
    s3.put("a.txt", b"a")
    items = items_of(s3.url)
    moved = dataclasses.replace(items[0].slices[0].file, url=f"{s3.url}/gone.txt")  # type: ignore[type-var]
    item = dataclasses.replace(items[0], slices=(dataclasses.replace(items[0].slices[0], file=moved),))
    with pytest.raises(UserError, match=r"gone\.txt"):
        read_items([item])
