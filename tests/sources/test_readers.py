"""Reading: every format against the texts that went in, from files and from what was fetched of them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.remote.remote_file import RemoteFile
from pipeline.sources import column_chunks, readers
from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.work_items import FileSlice, WorkItem, open_slice
from tests.support.texts import TEXTS, items_of, json_lines, read, read_fetched, write_parquet, zstd


def as_remote(items: list[WorkItem]) -> list[WorkItem]:
    """The same items of files that lie elsewhere; ``open_local`` opens them."""

    def moved(file_slice: FileSlice) -> FileSlice:
        size_bytes = Path(file_slice.path).stat().st_size
        url = f"s3://{file_slice.path}"
        return dataclasses.replace(
            file_slice, path="", file=RemoteFile(url=url, name=file_slice.name, size_bytes=size_bytes, version="")
        )

    return [dataclasses.replace(item, slices=tuple(moved(file_slice) for file_slice in item.slices)) for item in items]


def open_local(file_slice: FileSlice) -> BinaryIO:
    assert file_slice.file is not None
    return Path(file_slice.file.url.removeprefix("s3://")).open("rb")


def fetched(source: Path | str, *, item_bytes: int = 1_000_000) -> list[str]:
    return read_fetched(as_remote(items_of(source, item_bytes=item_bytes)), open_local)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_bytes", [1, 5100, 1_000_000])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "compression": "none", "data_page_size": 1}])
@pytest.mark.parametrize(
    "column", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path: Path, item_bytes: int, column: pa.DataType, options: dict[str, Any]) -> None:
    write_parquet(tmp_path / "a.parquet", [*TEXTS], column=column, **options)
    assert read(tmp_path, item_bytes=item_bytes) == fetched(tmp_path, item_bytes=item_bytes) == TEXTS


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
    assert read(tmp_path / name) == fetched(tmp_path / name) == TEXTS


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    range_bytes=st.integers(1, 80),
    chunk_bytes=st.integers(1, 100),
)
def test_json_ranges_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], range_bytes: int, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    texts = [f"{i} {'z' * length}" for i, length in enumerate(lengths)]
    path.write_bytes(json_lines(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sources.sources._RANGE_BYTES", range_bytes)
        patch.setattr("pipeline.sources.json_lines._CHUNK_BYTES", chunk_bytes)
        patch.setattr("pipeline.sources.column_chunks._GAP_BYTES", chunk_bytes)
        assert read(path, item_bytes=1) == fetched(path, item_bytes=1) == texts


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("third\r\nand last", newline="")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("first ½".encode()))
    (tmp_path / "d.txt.zst").write_bytes(zstd(b"fourth"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    assert read(tmp_path) == fetched(tmp_path) == ["first ½", "second", "third\r\nand last", "fourth"]
    assert len(items_of(tmp_path)) == 1
    assert len(items_of(tmp_path, item_bytes=1)) == 4


def test_mixed_folder_keeps_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["1", "2"]))
    write_parquet(tmp_path / "b.parquet", ["3", "4", "5"])
    (tmp_path / "c.txt").write_text("6")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    assert read(tmp_path) == fetched(tmp_path) == list("123456345")


def test_nulls_and_blanks_are_counted_and_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", None, "", " \n\t\u00a0", "b", None])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": null}\n{"text": ""}\n{"text": "c"}\n')
    (tmp_path / "c.txt").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert read(tmp_path, skipped=skipped) == ["a", "b", "c"]
    assert skipped == {"null": 3, "blank": 4}


# ---- what is fetched ------------------------------------------------------------------------------------------------


def test_fetched_row_groups_are_nothing_but_the_text_column(tmp_path: Path) -> None:
    texts = [random.Random(number).randbytes(2000).hex() for number in range(60)]
    noise = [random.Random(-number).randbytes(20_000) for number in range(60)]
    table = pa.table({"a": noise, "text": texts, "b": noise})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="none")
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "c.txt").write_text(texts[0])
    layouts = list(find(str(tmp_path)).layouts("text"))
    plan = make_plan(layouts, text_column="text", item_bytes=90_000)
    items = as_remote(plan)
    assert read_fetched(items, open_local) == [*texts, *texts, texts[0]]
    tail_bytes = 1 << 16
    for item in items:
        table = column_chunks.fetch_column_chunks(item, open_local)
        sizes = [len(data) for data in table["data"].to_pylist()]
        assert sum(sizes) <= item.size_bytes + tail_bytes + 5000  # a line may go on behind its range
        needed = column_chunks.needed_bytes([item], open_local)
        assert abs(needed - sum(sizes)) <= tail_bytes + 5000
    footer = pq.read_metadata(tmp_path / "a.parquet").serialized_size
    parts = [item for item in items if item.slices[0].kind == "parquet"]
    together = column_chunks.needed_bytes(parts, open_local)
    assert together == sum(column_chunks.needed_bytes([item], open_local) for item in parts) - footer * (len(parts) - 1)
    assert together < (tmp_path / "a.parquet").stat().st_size / 5


def test_reads_of_a_fetched_file_are_few(tmp_path: Path) -> None:
    class Counted:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file
            self.reads: list[int] = []

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def seek(self, *place: int) -> int:
            return self.file.seek(*place)

        def read(self, size: int) -> bytes:
            self.reads.append(size)
            return self.file.read(size)

    table = pa.table({"a": [b"x" * 3000] * 300, "text": ["y" * 3000] * 300})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, compression="none", use_dictionary=False)
    (item,) = as_remote(items_of(tmp_path, item_bytes=10**9))
    file = Counted(open_local(item.slices[0]))
    column_chunks.fetch_column_chunks(item, lambda file_slice: file)  # type: ignore[arg-type, return-value]
    assert len(file.reads) == 3  # end of file, footer, 300 chunks of the column with what lies between


def test_large_pieces_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.column_chunks._MAX_SLICE_BYTES", 20)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["large " * 10]))
    write_parquet(tmp_path / "b.parquet", ["large " * 10])
    (tmp_path / "c.txt").write_text("large " * 10)
    (tmp_path / "d.txt").write_text("small")
    (item,) = as_remote(items_of(tmp_path))
    table = column_chunks.fetch_column_chunks(item, open_local)
    assert table.to_pylist() == [{"slice": 3, "start": 0, "data": b"small"}]
    arrays = read_item(item, Counter(), table, open_file=open_local)
    assert [text for array in arrays for text in array.to_pylist()] == [*["large " * 10] * 3, "small"]


def test_what_was_not_fetched_is_not_read() -> None:
    file = column_chunks.SparseFile([(100, b"def"), (10, b"abc")])
    assert file.seek(0, 2) == 103
    file.seek(10)
    assert (file.read(2), file.read(1), file.tell()) == (b"ab", b"c", 13)
    assert file.seek(100) == 100
    assert (file.read(), file.read(5)) == (b"def", b"")
    for position, size in ((0, 5), (9, 2), (10, 4), (50, 1)):
        file.seek(position)
        with pytest.raises(OSError, match="were not fetched"):
            file.read(size)


# ---- memory: the paths of giant documents with small constants -------------------------------------------------------


def arrays_of(source: Path, *, item_bytes: int = 10**9) -> list[Any]:
    (item,) = items_of(source, item_bytes=item_bytes)
    return list(read_item(item, Counter()))


def test_arrays_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.readers._ARRAY_BYTES", 1000)
    texts = ["½" * 150] * 8 + ["giant" * 1000] + ["z"] * 1500 + ["giant" * 201] * 2
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    write_parquet(tmp_path / "b.parquet", [*texts], row_group_size=10_000)
    write_parquet(tmp_path / "c.parquet", [*texts], row_group_size=10_000, use_dictionary=False)
    for name in "abc":
        arrays = arrays_of(next(tmp_path.glob(f"{name}.*")))
        assert [text for array in arrays for text in array.to_pylist()] == texts
        sizes = [sum(len(text.encode()) for text in array.to_pylist()) for array in arrays]
        assert all(size <= 1000 or len(array) == 1 for size, array in zip(sizes, arrays, strict=True))
        assert len(arrays) < 12  # neighbours are put together


def test_rows_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a dictionary say nothing of their size, so few of them are expanded together."""
    asked: list[int] = []
    original = readers._row_batches

    def row_batches(parquet: Any, rows: int, *arguments: Any) -> Any:
        asked.append(rows)
        return original(parquet, rows, *arguments)

    monkeypatch.setattr(readers, "_row_batches", row_batches)
    small, large = "small", "l" * 100_000
    for texts, use_dictionary, rows in (
        ([small] * 5000, False, 4096),
        ([small] * 5000, True, 64),
        ([large] * 300, False, 20),
        ([random.Random(n).randbytes(2_500_000).hex() for n in range(2)] * 50, True, 64_000_000 // 5_000_000),
    ):
        write_parquet(tmp_path / "a.parquet", [*texts], row_group_size=10_000, use_dictionary=use_dictionary)
        asked.clear()
        assert sum(map(len, arrays_of(tmp_path))) == len(texts)
        assert rows * 0.8 <= asked[0] <= rows


ALPHABET = st.sampled_from(["a", '"', "\\", "\n", "é", "日", "🙂", "\ud83d", "\ude42", "\x00", "\u2028", "/", "ud83d"])


@settings(max_examples=300)
@given(
    texts=st.lists(st.lists(ALPHABET, max_size=40).map("".join), min_size=1, max_size=4),
    key=st.sampled_from(["text", "téxt", 'a"b\\']),
    ensure_ascii=st.booleans(),
    unescaped_bytes=st.integers(13, 40),
    literal_bytes=st.integers(9, 30),
)
def test_giant_lines_read_as_json_reads_them(
    texts: list[str], key: str, ensure_ascii: bool, unescaped_bytes: int, literal_bytes: int
) -> None:
    """Against json.loads; half a surrogate pair becomes U+FFFD in both ways."""
    from pipeline.sources import json_lines as module

    values = {f"k{texts[-1]}": texts[0], "list": [texts, {"": texts[-1]}, None, 1.5], key: texts[0], "z": texts[-1]}
    line = json.dumps(values, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")
    outcomes: list[bytes | str] = []
    for giant_bytes in (10**9, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_GIANT_BYTES", giant_bytes)
            patch.setattr(module, "_UNESCAPED_BYTES", unescaped_bytes)
            patch.setattr(module, "_LITERAL_BYTES", literal_bytes)
            try:
                text = module.text_of(line, key)
            except ValueError as error:
                outcomes.append(str(error)[:17])
                continue
        assert text is not None
        outcomes.append(text if isinstance(text, bytes) else text[0].as_py().encode())
    assert outcomes[0] == outcomes[1]
    joined = texts[0].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert outcomes[0] in (joined.encode(), b"is not UTF-8 text", "is not UTF-8 text")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaa', "is no JSON object (a string without end)"),
        (b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaa" 1}', "is no JSON object (Expecting ',' delimiter)"),
        (b'{"text": "aaaaaaaaaaaa\x01aaaaaaaaaaaaaaaa"}', "is no JSON object (Invalid control character at)"),
        (b'{"text": "aaaaaaaaaaaa\\xaaaaaaaaaaaaaaaa"}', "is no JSON object (Invalid \\escape"),
        (b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaa\xff"}', "is not UTF-8 text: byte 35 is 0xff"),
        (b'{"text": "a", "other": "aaaaaaaaaaaaaaaaaaaaaaaaa\xff"}', "is not UTF-8 text: byte 49 is 0xff"),
        (b'["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]', "holds a JSON list"),
    ],
)
def test_bad_giant_lines(line: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sources import json_lines as module

    monkeypatch.setattr(module, "_GIANT_BYTES", 10)
    monkeypatch.setattr(module, "_LITERAL_BYTES", 10)
    monkeypatch.setattr(module, "_UNESCAPED_BYTES", 13)
    with pytest.raises(ValueError) as raised:
        module.text_of(line, "text")
    assert str(raised.value).startswith(message)


def test_a_giant_line_has_an_array_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_GIANT_BYTES": 1000,
        "_LITERAL_BYTES": 100,
        "_UNESCAPED_BYTES": 50,
        "_CHUNK_BYTES": 64,
    }.items():
        monkeypatch.setattr(f"pipeline.sources.json_lines.{name}", value)
    monkeypatch.setattr("pipeline.sources.readers._ARRAY_BYTES", 1000)
    texts = ["one", 'gi"ant\n½🙂' * 200, "three", "four", "\ufeff giant" * 300]
    for content in (json_lines(texts), b"\xef\xbb\xbf" + json_lines(texts[1:])):
        (tmp_path / "a.jsonl").write_bytes(content)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
        expected = texts[-content.count(b"\n") :]
        assert read(tmp_path) == fetched(tmp_path) == expected * 2
    assert [len(array) for array in arrays_of(tmp_path / "a.jsonl")] == [1, 2, 1]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null, "other": "' + b"z" * 5000 + b'"}\n')
    assert arrays_of(tmp_path / "a.jsonl") == []


def test_unreachable_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (item,) = as_remote(items_of(tmp_path))

    def open_file(file_slice: FileSlice) -> BinaryIO:
        raise UserError(f"{file_slice.where} cannot be reached")

    with pytest.raises(UserError, match="cannot be reached"):
        column_chunks.fetch_column_chunks(item, open_file)
    assert open_slice(items_of(tmp_path)[0].slices[0]).read() == b"a"
