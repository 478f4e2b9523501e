"""Text files of many documents: the same documents in any parts and reads; separators, sizes, what is left out."""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedInputError
from pipeline.sources import documents, readers
from pipeline.sources.documents import Separator
from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.work_items import DocumentRules
from tests.sources.test_readers import as_remote, open_local
from tests.support.texts import items_of, read_fetched, read_items, zstd

SEPARATORS = ["<|endoftext|>", "\n\n", "====", "aba", "\n---\n", "x"]


PIECES = ["a", "ab", "aba", "=", "é日", "\n", "\r\n", " ", "x", "<|endoftext|>", "=====", "---"]


def divided(text: str, separator: str) -> list[str]:
    """By hand: what is left of the text between the characters that belong to an occurrence of the separator."""
    if separator == "\n\n":
        parts = re.split(r"\n(?:\r?\n)+", text)
    else:
        is_inside = [False] * len(text)
        for start in range(len(text)):
            if text.startswith(separator, start):
                is_inside[start : start + len(separator)] = [True] * len(separator)
        parts = re.split("\0+", "".join("\0" if inside else sign for inside, sign in zip(is_inside, text, strict=True)))
    return [part.strip("\r\n") for part in parts if part.strip()]


@settings(max_examples=150)
@given(
    parts=st.lists(st.sampled_from(PIECES), max_size=40),
    separator=st.sampled_from(SEPARATORS),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 30)),
)
@example(parts=["a", "\r\n", "\r\n", "ab"], separator="\n\n", sizes=(1, 1, 1))
def test_every_document_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], separator: str, sizes: tuple[int, int, int]
) -> None:
    """From files divided anywhere, read in pieces of any size, and from what was fetched of them."""
    text = "".join(parts)
    expected = divided(text, separator)
    path = tmp_path_factory.mktemp("documents") / "a.txt"
    path.write_bytes(text.encode())
    chunk_bytes, range_bytes, item_bytes = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr("pipeline.sources.column_chunks._GAP_BYTES", chunk_bytes)
        patch.setattr("pipeline.sources.sources._RANGE_BYTES", range_bytes)
        for giant_bytes in (10**9, 2):
            patch.setattr(documents, "_GIANT_BYTES", giant_bytes)
            if text:
                items = items_of(path, item_bytes=item_bytes, document_separator=separator)
                assert read_items(items) == expected
                assert read_fetched(as_remote(items), open_local) == expected
        Path(f"{path}.gz").write_bytes(gzip.compress(text.encode()))
        if text:
            assert read_items(items_of(f"{path}.gz", document_separator=separator)) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
def test_limit_documents_counts_documents(tmp_path: Path, name: str, limit: int) -> None:
    content = b"one<|e|>\n<|e|>two\n<|e|>three<|e|>four"
    (tmp_path / name).write_bytes(zstd(content) if name.endswith("zst") else content)
    layouts = find(str(tmp_path)).layouts("text", has_separator=True)
    rules = DocumentRules(document_separator="<|e|>")
    items = make_plan(layouts, text_column="text", item_bytes=100, limit_documents=limit, rules=rules)
    assert read_items(items) == ["one", "two", "three", "four"][:limit]


def test_a_mark_at_the_start_and_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n one \r\n<|e|>\r\n\r\n two\n")
    assert read_items(items_of(tmp_path, document_separator="<|e|>")) == [" one ", " two"]


def test_other_kinds_are_not_divided(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one<|e|>two"}\n')
    assert read_items(items_of(tmp_path, document_separator="<|e|>")) == ["one<|e|>two"]


def test_a_document_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one<|e|>tw\xe9o<|e|>three")
    (item,) = items_of(tmp_path, document_separator="<|e|>")
    with pytest.raises(DamagedInputError, match=r"document 2 of .*a\.txt is not UTF-8 text: byte 2 is 0xe9"):
        list(read_item(item, Counter()))
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    texts = [text for array in read_item(item, skipped, None, None, first) for text in array.to_pylist()]
    assert (texts, skipped) == (["one", "three"], {"not UTF-8": 1})
    assert first == {"not UTF-8": "document 2 of a.txt is not UTF-8 text: byte 2 is 0xe9"}


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_bytes", "giant_bytes"), [(7, 10**9), (1 << 20, 10**9), (7, 10)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet", "b"])
def test_large_documents_are_counted_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int, giant_bytes: int
) -> None:
    from tests.support.texts import json_lines, write_parquet

    monkeypatch.setattr(documents, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(documents, "_GIANT_BYTES", giant_bytes)
    texts = ["short", "é" * 25, "z" * 51, "w" * 500, "last"]
    if name == "b":
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
            Path(tmp_path / f"{number}-.txt.gz").write_bytes(gzip.compress(text.encode()))
    elif name == "a.parquet":
        write_parquet(tmp_path / name, [*texts])
    else:
        content = json_lines(texts) if "json" in name else "<|e|>".join(texts).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rules: dict[str, Any] = {"max_document_bytes": 50} | (
        {"document_separator": "<|e|>"} if name.startswith("a.txt") else {}
    )
    skipped: Counter[str] = Counter()
    items = items_of(tmp_path, **rules)
    times = 2 if name == "b" else 1
    assert sorted(read_items(items, skipped=skipped)) == sorted([texts[0], texts[1], texts[4]] * times)
    assert skipped == {"above max_document_bytes": 2 * times}


def test_a_large_document_takes_no_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes held while a document of 10 MB is passed over, of which 1,000 are allowed."""
    import tracemalloc

    monkeypatch.setattr(documents, "_CHUNK_BYTES", 1000)
    content = io.BytesIO(b"one<|e|>" + b"z" * 10_000_000 + b"<|e|>three")
    tracemalloc.start()
    found = list(documents.read_documents(content, 0, None, Separator("<|e|>"), max_bytes=1000, limit=1 << 62))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(0, b"one"), (8, None), (10_000_013, b"three")]
    assert peak < 100_000


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".txt.zst", ".documents.txt.gz", ".jsonl.bz2", ".txt.xz"])
def test_what_expands_without_end_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    import bz2
    import lzma

    monkeypatch.setattr(readers, "EXPANDED_BYTES", 1_000_000)
    monkeypatch.setattr("pipeline.sources.json_lines._CHUNK_BYTES", 100_000)
    text = b"z" * 20_000_000
    content = b'{"text": "' + text + b'"}\n' if "json" in suffix else text
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "st": zstd,
        "z2": bz2.compress,
        "xz": lzma.compress,
    }
    pack = packers[suffix[-2:]]
    (tmp_path / f"a{suffix}").write_bytes(pack(content))
    rules: dict[str, Any] = {"document_separator": "<|e|>"} if "documents" in suffix else {}
    (item,) = items_of(tmp_path, **rules)
    with pytest.raises(DamagedInputError, match=r"expands to more than 100 times its size is not read.*unpack"):
        list(read_item(item, Counter()))
    notes: list[dict[str, str]] = []
    assert list(read_item(item, Counter(), None, notes)) == [] and [note["name"] for note in notes] == [f"a{suffix}"]
    many = (b'{"text": "' + b"z" * 900 + b'"}\n' if "json" in suffix else b"z" * 900 + b"<|e|>") * 2000
    if "json" in suffix or rules:  # many records that repeat are as good as others
        (tmp_path / f"a{suffix}").write_bytes(pack(many))
        assert len(read_items(items_of(tmp_path, **rules))) == 2000


def test_cells_that_expand_without_end_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.texts import read, write_parquet

    monkeypatch.setattr(readers, "EXPANDED_BYTES", 1_000_000)
    monkeypatch.setattr(readers, "_GIANT_CELL_BYTES", 100_000)
    for use_dictionary in (True, False):
        write_parquet(tmp_path / "a.parquet", ["z" * 5_000_000, "y"], use_dictionary=use_dictionary)
        (item,) = items_of(tmp_path)
        with pytest.raises(DamagedInputError, match=r"row group 0 of .* holds 2 cells of \d+ MB in 0\.\d+ MB: cells"):
            list(read_item(item, Counter()))
    write_parquet(tmp_path / "a.parquet", ["z" * 5000] * 2000, row_group_size=2000, use_dictionary=False)
    assert len(read(tmp_path)) == 2000
