"""Texts, files of every format made of them, and ways to read them back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.sources import column_chunks
from pipeline.sources.plan import load_plan, make_plan, save_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.work_items import DocumentRules, FileSlice, WorkItem, open_slice

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
    path: Path, texts: list[str | None], *, row_group_size: int = 2, column: pa.DataType | None = None, **options: Any
) -> None:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string()).cast(column or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, **{"compression": "zstd", **options})


def items_of(
    source: Path | str, *, item_bytes: int = 1_000_000, text_column: str = "text", **rules: Any
) -> list[WorkItem]:
    layouts = find(str(source)).layouts(text_column, has_separator="document_separator" in rules)
    return make_plan(layouts, text_column=text_column, item_bytes=item_bytes, rules=DocumentRules(**rules))


def read_items(items: list[WorkItem], **options: Any) -> list[str]:
    """The texts of all items; every item survives its way through JSON first."""
    copies = load_plan(save_plan(items))
    skipped, first_bad = options.get("skipped", Counter()), options.get("first_bad")
    arrays = [array for item in copies for array in read_item(item, skipped, None, None, first_bad)]
    assert {array.type for array in arrays} <= {pa.large_string()}
    assert not any(array.null_count for array in arrays)
    return [text for array in arrays for text in array.to_pylist()]


def read(source: Path | str, *, item_bytes: int = 1_000_000, **options: Any) -> list[str]:
    return read_items(items_of(source, item_bytes=item_bytes), **options)


def read_fetched(items: list[WorkItem], open_file: Callable[[FileSlice], BinaryIO] = open_slice) -> list[str]:
    """The texts of items of a remote source, read from what was fetched of it and nothing else."""
    texts = []
    for item in items:
        table = column_chunks.fetch_column_chunks(item, open_file)
        assert table.schema == column_chunks.SCHEMA
        assert set(table["slice"].to_pylist()) == set(range(len(item.slices)))  # nothing is left to be opened
        texts += [text for array in read_item(item, Counter(), table) for text in array.to_pylist()]
    return texts


def mistake(source: Path | str, *, text_column: str = "text", kind: type[UserError] = UserError) -> str:
    """The sentence that planning or reading ends with."""
    with pytest.raises(UserError) as raised:
        for item in items_of(source, text_column=text_column):
            list(read_item(item, Counter()))
    assert "\n" not in str(raised.value)
    assert type(raised.value) is kind
    return str(raised.value)
