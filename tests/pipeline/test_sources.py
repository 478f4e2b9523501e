"""Plans and reading: every format and source against the texts that went in, every mistake against its sentence."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import docstrings, sources
from pipeline.errors import UserError
from pipeline.readers import read_item
from pipeline.sources import WorkItem, find, pack, plan, spread
from tests.pipeline.fake_hub import NAME, FakeHub, running_hub

TEXTS = [
    "A first text.",
    "  dzień dobry, ½ of Ⅷ 日本語 🙂\n\nend",
    "x",
    "\ufeffstarts with a mark",
    "<|endoftext|>",
    "y" * 5000,
]


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(
    path: Path, texts: list[str | None], *, row_group_size: int = 2, column: pa.DataType | None = None
) -> None:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string()).cast(column or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, compression="zstd")


def items_of(source: Path | str, *, item_bytes: int = 1_000_000, text_column: str = "text") -> list[WorkItem]:
    return plan(find(str(source)), text_column=text_column, item_bytes=item_bytes)


def read(source: Path | str, *, item_bytes: int = 1_000_000, skipped: Counter[str] | None = None) -> list[Any]:
    counts: Counter[str] = Counter() if skipped is None else skipped
    items = items_of(source, item_bytes=item_bytes)
    return [text for item in items for array in read_item(item, counts) for text in array.to_pylist()]


def mistake(source: Path | str, *, text_column: str = "text") -> str:
    """The sentence that planning or reading ends with."""
    with pytest.raises(UserError) as raised:
        for item in items_of(source, text_column=text_column):
            list(read_item(item, Counter()))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_bytes", [1, 5100, 1_000_000])
@pytest.mark.parametrize("column", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, item_bytes: int, column: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", [*TEXTS], column=column)
    assert read(tmp_path, item_bytes=item_bytes) == TEXTS


def test_parquet_row_groups_are_divided_and_packed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [f"{i:01000}" for i in range(10)])
    write_parquet(tmp_path / "b.parquet", [f"{i:01000}" for i in range(10, 14)])
    three_groups = 3 * find(str(tmp_path)).pieces("text")[0].size_bytes
    items = items_of(tmp_path, item_bytes=three_groups)
    assert [item.label for item in items] == [
        "a.parquet row groups 0-3",
        "a.parquet row groups 3-5 to b.parquet row groups 0-1",
        "b.parquet row groups 1-2",
    ]
    assert [item.index for item in items] == [0, 1, 2]
    assert read(tmp_path, item_bytes=three_groups) == [f"{i:01000}" for i in range(14)]


def test_parquet_column_below_a_nested_one(tmp_path: Path) -> None:
    table = pa.table({"meta": [{"text": 1, "b": 2}] * 3, "text": ["a" * 500, "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (item,) = items_of(tmp_path)
    assert item.size_bytes > 500
    assert read(tmp_path) == table["text"].to_pylist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(TEXTS)),
        ("a.json", b"\xef\xbb\xbf" + json_lines(TEXTS) + b"\n  \n"),
        ("a.ndjson", json_lines(TEXTS).replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS[:2])) + gzip.compress(json_lines(TEXTS[2:]))),
        ("a.json.zst", zstd(json_lines(TEXTS[:2])) + zstd(json_lines(TEXTS[2:]))),
        ("a.jsonl.zst", zstd(json_lines(TEXTS).rstrip(b"\n"))),
    ],
)
def test_json_lines(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == TEXTS


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), range_bytes=st.integers(1, 80))
def test_json_ranges_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], range_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    texts = [f"{i} {'z' * length}" for i, length in enumerate(lengths)]
    path.write_bytes(json_lines(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_RANGE_BYTES", range_bytes)
        assert read(path, item_bytes=1) == texts


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "c.txt").write_text("third\r\nand last", newline="")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("first ½".encode()))
    (tmp_path / "deep" / "b.txt.zst").write_bytes(zstd(b"fourth"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    (tmp_path / "notes.md").write_text("no text file")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert read(tmp_path) == ["first ½", "second", "third\r\nand last", "fourth"]
    assert len(items_of(tmp_path)) == 1
    assert len(items_of(tmp_path, item_bytes=1)) == 4
    assert read(f"{tmp_path}/*.txt") == ["second", "third\r\nand last"]
    assert read(f"{tmp_path}/**/*.zst") == ["fourth"]


def test_mixed_folder_keeps_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["1", "2"]))
    write_parquet(tmp_path / "b.parquet", ["3", "4", "5"])
    (tmp_path / "c.txt").write_text("6")
    assert read(tmp_path) == list("123456")


def test_nulls_and_blanks_are_counted_and_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", None, "", " \n\t\u00a0", "b", None])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": null}\n{"text": ""}\n{"text": "c"}\n')
    (tmp_path / "c.txt").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert read(tmp_path, skipped=skipped) == ["a", "b", "c"]
    assert skipped == {"null": 3, "blank": 4}


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.readers._BATCH_CHARS", 1000)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["z" * 300] * 20))
    (item,) = items_of(tmp_path)
    assert [len(array) for array in read_item(item, Counter())] == [4] * 5


# ---- plans -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=40), limit=st.integers(1, 120))
def test_pack_and_spread(sizes: list[int], limit: int) -> None:
    pieces = [
        sources.Piece(name="f", path="f", kind="parquet", version="", start=i, stop=i + 1, size_bytes=size)
        for i, size in enumerate(sizes)
    ]
    items = pack(pieces, text_column="text", item_bytes=limit)
    groups = [group for item in items for piece in item.pieces for group in range(piece.start, piece.stop)]
    assert groups == list(range(len(sizes)))
    assert all(item.size_bytes <= limit or item.pieces[0].stop - item.pieces[0].start == 1 for item in items)
    assert all(a.size_bytes + sizes[b.pieces[0].start] > limit for a, b in itertools.pairwise(items))
    sample = spread(pieces, limit)
    assert sample
    assert len(sample) == 1 or sum(piece.size_bytes for piece in sample) <= limit
    if sum(sizes) <= limit:
        assert sample == pieces


def test_spread_is_even() -> None:
    pieces = [
        sources.Piece(name="f", path="f", kind="parquet", version="", start=i, stop=i + 1, size_bytes=10)
        for i in range(1000)
    ]
    assert [piece.start for piece in spread(pieces, 50)] == [199, 399, 599, 799, 999]


def test_plan_is_the_same_on_every_machine_but_knows_changes(tmp_path: Path) -> None:
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "a.parquet", [*TEXTS])
        os.utime(tmp_path / folder / "a.parquet", ns=(0, 12345))
        source = find(str(tmp_path / folder))
        (item,) = items_of(tmp_path / folder)
        assert WorkItem.from_json(item.to_json()) == item
        keys.append((item.key, item.label, [entry.describe() for entry in source.inputs()]))
    assert keys[0] == keys[1]
    assert str(tmp_path) not in json.dumps(keys)
    os.utime(tmp_path / "there" / "a.parquet", ns=(0, 12346))
    assert items_of(tmp_path / "there")[0].key != keys[0][0]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert mistake(tmp_path / "absent") == f"source {tmp_path}/absent does not exist (looked for {tmp_path}/absent)"
    assert "no .parquet, .jsonl or .txt" in mistake(f"{tmp_path}/*.parquet")
    assert f"folder {tmp_path} holds no .parquet" in mistake(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    assert "a.csv is no .parquet" in mistake(tmp_path / "a.csv")
    assert "only local paths" in mistake("s3://bucket/a.parquet")
    (tmp_path / "a.txt").write_text("")
    assert mistake(tmp_path) == f"source {tmp_path} holds no text"


def test_parquet_without_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    assert "has no column 'body', only id, text; name one with --text_column" in mistake(tmp_path, text_column="body")
    assert "column 'id'" in mistake(tmp_path, text_column="id")
    assert "holds int64, not text" in mistake(tmp_path, text_column="id")


def damaged(content: bytes, kind: str) -> bytes:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "end cut": content[:-3],
        "middle": content[: middle - 50] + bytes(100) + content[middle + 50 :],
        "nonsense": b"something else altogether",
        "empty": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["cut", "end cut", "middle", "nonsense"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
def test_damaged_compressed_file(tmp_path: Path, suffix: str, kind: str) -> None:
    text = json_lines([random.Random(i).randbytes(300).hex() for i in range(100)])
    content = gzip.compress(text) if suffix.endswith("gz") else zstd(text)
    (tmp_path / f"a{suffix}").write_bytes(damaged(content, kind))
    assert f"{tmp_path}/a{suffix} cannot be read, it may be damaged or truncated: " in mistake(tmp_path)


@pytest.mark.parametrize("kind", ["cut", "end cut", "middle", "nonsense", "empty"])
def test_damaged_parquet(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [random.Random(i).randbytes(300).hex() for i in range(100)], row_group_size=100)
    path.write_bytes(damaged(path.read_bytes(), kind))
    assert f"{path} cannot be read, it may be damaged or truncated: " in mistake(tmp_path)


def test_file_that_vanishes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    (item,) = items_of(tmp_path)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"a\.parquet is missing"):
        list(read_item(item, Counter()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is no JSON object"),
        (b"hello", "is no JSON object"),
        (b'["a"]', "holds a JSON list; one object per line is expected"),
        (b'{"body": "a", "id": 1}', "has no key 'text', only body, id; name one with --text_column"),
        (b'{"text": 5}', "has a int under 'text', not text"),
        (b'{"text": "a\xff"}', "is not UTF-8 text: byte 11 is 0xff"),
        (b'{"text": "\\ud800"}', "is not UTF-8 text: it spells half a surrogate pair"),
        (b'{"text": "\\uD83D\\uDE42"}', ""),
        (b"[" * 100_000, "is no JSON object"),
    ],
)
@pytest.mark.parametrize("range_bytes", [7, 40, 4_000_000])
def test_bad_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, range_bytes: int
) -> None:
    monkeypatch.setattr(sources, "_RANGE_BYTES", range_bytes if len(line) < 100 else 10**6)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two"]) + b"\n" + line + b"\n" + json_lines(["four"]))
    if message:
        assert f"line 4 of {tmp_path}/a.jsonl {message}" in mistake(tmp_path)
    else:
        assert read(tmp_path) == ["one", "two", "🙂", "four"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("żółw".encode() + b"\xe9")
    assert mistake(tmp_path) == f"{tmp_path}/a.txt is not UTF-8 text: byte 7 is 0xe9"
    (tmp_path / "a.txt").unlink()
    column = pa.array([b"one", b"two", None, b"f\xffur", b"five"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert mistake(tmp_path) == f"row 3 of {tmp_path}/a.parquet is not UTF-8 text: byte 1 is 0xff"


# ---- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    write_parquet(tmp_path / "a.parquet", [*TEXTS])
    write_parquet(tmp_path / "b.parquet", ["b1", "b2", "b3"])
    files = {
        "README.md": b"# no data",
        "data/b.parquet": (tmp_path / "b.parquet").read_bytes(),
        "data/a.parquet": (tmp_path / "a.parquet").read_bytes(),
        "more/c.jsonl": json_lines(["c1", "c2"]),
    }
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_hub_data_set(hub: FakeHub) -> None:
    assert read(f"hf://datasets/{NAME}") == [*TEXTS, "b1", "b2", "b3", "c1", "c2"]
    assert read(f"hf://datasets/{NAME}@main/data") == [*TEXTS, "b1", "b2", "b3"]
    assert read(f"hf://datasets/{NAME}@refs%2Fconvert%2Fparquet/data/b*", item_bytes=1) == ["b1", "b2", "b3"]
    assert hub.tokens == {None}


def test_hub_plan_reads_footers_only_and_pins_the_commit(hub: FakeHub) -> None:
    source = find(f"hf://datasets/{NAME}/data")
    items = plan(source, text_column="text", item_bytes=1)
    assert [item.label for item in items][:2] == ["data/a.parquet row groups 0-1", "data/a.parquet row groups 1-2"]
    assert [entry.version.split()[0] for entry in source.inputs()] == [f"{NAME}@{'a' * 40}"] * 2
    assert source.pinned == f"hf://datasets/{NAME}@{'a' * 40}/data"
    old = dict(hub.commits[hub.branch])
    hub.push("b" * 40, {"data/a.parquet": b"moved on"})
    assert [text for item in items for array in read_item(item, Counter()) for text in array.to_pylist()][:2] == TEXTS[
        :2
    ]
    assert read(str(source.pinned)) == [*TEXTS, "b1", "b2", "b3"]
    assert old == hub.commits["a" * 40]
    gets = [request for request in hub.requests if request == f"GET /datasets/{NAME}/resolve/{'a' * 40}/data/a.parquet"]
    assert len(gets) <= 3  # footers of two plans and one download for all row groups


def test_hub_token_comes_from_the_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (item,) = items_of(f"hf://datasets/{NAME}/data/b.parquet")
    list(read_item(item, Counter()))
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in item.to_json()


def test_hub_mistakes(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the hub has no such data set, or it is private" in mistake("hf://datasets/someone/absent")
    assert "the hub has no such revision" in mistake(f"hf://datasets/{NAME}@v9")
    assert "file of the hub matches the source" in mistake(f"hf://datasets/{NAME}/absent/*.parquet")
    assert "is not of the form hf://datasets/OWNER/NAME" in mistake("hf://datasets/only-a-name")
    assert "has no column 'body'" in mistake(f"hf://datasets/{NAME}/data", text_column="body")
    items = items_of(f"hf://datasets/{NAME}/data")
    hub.push("a" * 40, {})
    with pytest.raises(UserError, match=r"someone/texts/data/a\.parquet: the hub has no such file"):
        list(read_item(items[0], Counter()))
    hub.push("a" * 40, {"a.parquet": b"PAR1 damaged PAR1"})
    assert "someone/texts/a.parquet is no readable parquet file" in mistake(f"hf://datasets/{NAME}")
    hub.gated = True
    assert "access is gated; accept its terms on the hub and set HF_TOKEN" in mistake(f"hf://datasets/{NAME}")
    hub.gated, hub.failing = False, True
    assert "the hub answered with an error (503)" in mistake(f"hf://datasets/{NAME}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in mistake(f"hf://datasets/{NAME}")


# ---- installed docs --------------------------------------------------------------------------------------------------

MODULE = '''\
"""A module about shapes.

    It says so at some length, as documentation does, so that it is worth a document of its own.
"""

CONSTANT = """not documentation, however long it may be, as it is bound to a name and nobody reads it as such"""

class Circle(Shape, metaclass=Meta):
    """All points of one distance."""

    def area(self, *, unit: str = "m",
             digits: int = 3) -> float:
        """The area.

            Indented more.
        """

    def hidden(self): return 1

if True:
    async def draw(shape):
        """Draw it, half a pair: \\ud800."""
        def inner():
            """Nobody sees this."""

def one_line(): "A short one."
'''
DOCUMENT = """\
pkg.shapes

A module about shapes.

It says so at some length, as documentation does, so that it is worth a document of its own.

pkg.shapes.Circle(Shape, metaclass=Meta)

All points of one distance.

pkg.shapes.Circle.area(self, *, unit: str = "m", digits: int = 3) -> float

The area.

Indented more.

pkg.shapes.draw(shape)

Draw it, half a pair: ?.

pkg.shapes.one_line

A short one."""


def test_installed_docs_on_a_made_up_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files: dict[Path, str | bytes] = {
        library / "shapes.py": MODULE,
        packages / "pkg" / "__init__.py": '"""' + "The package itself. " * 20 + '"""',
        packages / "pkg" / "shapes.py": MODULE,
        packages / "pkg" / "latin.py": b'"""' + b"caf\xe9 " * 50 + b'"""',
        packages / "pkg" / "broken.py": '"""' + "Fine. " * 50 + '"""\nprint "so 2.7"',
        packages / "pkg" / "short.py": '"""Too short to be worth it."""',
        packages / "pkg" / "code.py": MODULE + "code = code + 1\n" * 500,
        packages / "pkg" / "tests" / "test_it.py": MODULE,
        packages / "pkg" / "__pycache__" / "shapes.py": MODULE,
        packages / "pkg-1.5.dist-info" / "METADATA": "",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(docstrings, "package_roots", lambda: [library, packages])
    skipped: Counter[str] = Counter()
    documents = read("installed-docs", skipped=skipped)
    assert [document.split("\n")[0] for document in documents] == ["pkg", "pkg.shapes", "shapes"]
    assert documents[1] == DOCUMENT
    assert skipped == {"module that cannot be parsed": 2, "module with little documentation": 2}
    assert {entry.name: entry.version for entry in find("installed-docs").inputs()}["pkg"] == "1.5"


def test_installed_docs_here() -> None:
    """A few of the packages that run this test; numpy's own inspect view is the reference for one docstring."""
    import inspect

    import numpy as np

    source = find("installed-docs")
    pieces = [piece for piece in source.pieces("text") if piece.name.startswith(("numpy/lib/", "json/"))]
    (item,) = pack(pieces, text_column="text", item_bytes=10**9)
    (texts,) = read_item(item, Counter())
    documents = {str(text).split("\n")[0]: str(text) for text in texts.to_pylist()}
    assert "json.decoder" in documents
    assert str(inspect.getdoc(np.unwrap)) in documents["numpy.lib._function_base_impl"].replace("\\\\", "\\")
    assert "numpy.lib._function_base_impl.unwrap(p, discont=None" in documents["numpy.lib._function_base_impl"]
