"""Random trees of files as people have them, and one tree in every place: on a disk, in a bucket, on the hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import Source, find
from tests.support.texts import zstd

TABLES = (".parquet", ".arrow", ".feather", ".csv", ".tsv")
LINES = (".jsonl", ".ndjson", ".json")
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".zstd": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
FOLDERS = (
    "",
    "data",
    "data/2023",
    "data/2024",
    "Data",
    "_tmp",
    ".cache",
    "_year=2020",
    "a b",
    "50%",
    "what?",
    "x#y",
    "[1]",
    "ü",
)
ODD = (
    "README.md",
    "LICENSE.txt",
    "urls.txt",
    "dataset_infos.json",
    "state.json",
    "_SUCCESS",
    ".part.crc",
    "a.png",
    "a.parquet.gz",
    "cache-0a1b2c.arrow",
    "a.jsonl.lz4",
    "no_suffix",
    "a.txt~",
    "summary.json.bak",
)


def file_of(suffix: str, texts: list[str]) -> bytes:
    """A file of that suffix, in any case, with the texts as its records; of a text file, the first is the document."""
    suffix = suffix.lower()
    stem, _, packing = suffix[1:].partition(".")
    return PACKED[f".{packing}" if packing else ""](_plain_file(f".{stem}", texts))


def _plain_file(suffix: str, texts: list[str]) -> bytes:
    table, sink = pa.table({"id": range(len(texts)), "text": texts}), pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table, sink)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(table, sink)
    elif suffix == ".arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:  # as the datasets library writes it
            writer.write_table(table)
    if suffix in (".parquet", ".feather", ".arrow"):
        return bytes(sink.getvalue())
    if suffix in (".csv", ".tsv"):
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerows([("id", "text"), *enumerate(texts)])
        return lines.getvalue().encode()
    if suffix == ".txt":
        return texts[0].encode()
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)).encode()


def random_tree(choose: random.Random) -> dict[str, bytes]:
    """Name -> content: data of some kinds in some folders, and what lies beside it; no name is a folder of another."""
    suffixes = choose.sample([*TABLES, *LINES, ".txt"], k=choose.randrange(1, 4))
    tree: dict[str, bytes] = {}
    for number in range(choose.randrange(1, 9)):
        suffix = choose.choice(suffixes)
        if suffix not in TABLES[:3]:
            suffix += choose.choice([*PACKED, "", ""])
        content = file_of(
            suffix, [f'{number}.{row} dzień, "½"\n{choose.random()}' for row in range(choose.randrange(1, 4))]
        )
        shown = suffix.upper() if choose.random() < 0.2 else suffix
        prefix = choose.choice(["part-", "part-", "part-", "_part-", ".part-"])
        tree[_inside(choose.choice(FOLDERS), f"{prefix}{number}{shown}")] = content
    for name in choose.sample(ODD, k=choose.randrange(0, 5)):
        tree[_inside(choose.choice(FOLDERS), name)] = b"not a document, not even words of data"
    if choose.random() < 0.2:  # what a job left below the source
        tree |= {
            f"tokens/{name}": b"{}" for name in ("items/run.json", "manifest.json", "summary.json", "mlflow_run.json")
        }
    return tree


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def write_tree(base: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)


def documents(source: str, **options: Any) -> list[str]:
    """All documents of a source, in order."""
    return documents_of(find(source), **options)


def documents_of(source: Source, damaged: list[dict[str, str]] | None = None) -> list[str]:
    items = make_plan(source.layouts("text", None, damaged), text_column="text", item_bytes=10**6)
    return [text for item in items for array in read_item(item, Counter(), None, damaged) for text in array.to_pylist()]
