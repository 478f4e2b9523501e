"""Tables that are read whole: .csv and .tsv with a named column, .arrow and .feather.

Rows of comma-separated values may span lines, so neither they nor Arrow's streams can be divided without reading them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import DamagedInputError
from pipeline.sources.compressions import unpacked
from pipeline.sources.text_columns import find_columns, find_names, joined_texts
from pipeline.sources.work_items import FileSlice, WorkItem, open_slice, reading

_FILE_MAGIC = b"ARROW1"
_OLD_FEATHER_MAGIC = b"FEA1"
_MAX_FIELD_CHARS = 1 << 31


def check_table(whole: FileSlice, text_column: str) -> None:
    """Raise LookupError where a table has no text in the column, by its first bytes."""
    with reading(whole.where), open_slice(whole) as file:
        if whole.kind == "arrow":
            find_columns(_arrow_schema(file, whole), text_column)
        else:
            _csv_columns(_csv_rows(file, whole), text_column)


def count_rows(whole: FileSlice, limit: int) -> int:
    """The number of rows of a table, counted up to ``limit``."""
    rows = 0
    with reading(whole.where), open_slice(whole) as file:
        if whole.kind == "arrow":
            for batch in _arrow_batches(file, [0]):
                rows += batch.num_rows
                if rows >= limit:
                    break
        else:
            rows = sum(1 for _ in itertools.islice(filter(None, _csv_rows(file, whole)), limit + 1)) - 1
    return max(0, min(rows, limit))


def csv_texts(file_slice: FileSlice, item: WorkItem, file: Any) -> Iterator[bytes | None]:
    """The texts of a .csv or .tsv file, UTF-8; None for a row that ends before the column. Blank lines are no rows."""
    rows = filter(None, _csv_rows(file, file_slice))
    with _column_explained(file_slice):
        columns = _csv_columns(rows, item.text_column)
    for row in itertools.islice(rows, file_slice.max_documents):
        texts = [row[column] for column in columns if column < len(row)]
        if len(columns) > 1:
            texts = [text for text in texts if text and not text.isspace()] or texts[:1]
        yield item.rules.column_separator.join(texts).encode() if texts else None


def arrow_texts(file_slice: FileSlice, item: WorkItem, file: Any) -> Iterator[pa.Array]:
    """The texts of an Arrow stream or file, large_string, batch by batch, checked to be sound and UTF-8."""
    left = file_slice.max_documents
    schema = _arrow_schema(file, file_slice)
    with _column_explained(file_slice):
        columns = find_columns(schema, item.text_column)
    fields = sorted({schema.get_field_index(column.path[0]) for column in columns})
    for batch in _arrow_batches(file, fields):
        texts = joined_texts(batch.slice(0, left), columns, item.rules.column_separator)
        yield texts
        if left is not None and (left := left - len(texts)) == 0:
            return


def _csv_rows(file: Any, file_slice: FileSlice) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    text = io.TextIOWrapper(unpacked(file, file_slice.name), encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if file_slice.kind == "tsv" else ",", strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise DamagedInputError(f"line {reader.line_num} of {file_slice.where} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DamagedInputError(
            f"{file_slice.where} is not UTF-8 text behind its line {reader.line_num}: byte {byte:#04x}"
        ) from error


def _csv_columns(rows: Iterator[list[str]], text_column: str) -> list[int]:
    """Numbers of the columns; none where the file is empty."""
    names = next(filter(None, rows), [])
    return find_names(names, text_column) if names else []


@contextlib.contextmanager
def _column_explained(file_slice: FileSlice) -> Iterator[None]:
    """Turn the LookupError of a file that was changed since the plan was made into a sentence about it."""
    try:
        yield
    except LookupError as error:
        raise DamagedInputError(f"{file_slice.where} {error.args[0]}") from error


def _arrow_schema(file: Any, file_slice: FileSlice) -> pa.Schema:
    """The schema; the file is left at its start."""
    magic = bytes(file.read(len(_FILE_MAGIC)))
    file.seek(0)
    if magic.startswith(_OLD_FEATHER_MAGIC):
        raise DamagedInputError(
            f"{file_slice.where} is of the first version of Feather, which is not read; write it anew with "
            "pyarrow.feather.write_feather"
        )
    with _open_arrow(file, magic == _FILE_MAGIC, None) as reader:
        schema = reader.schema
    file.seek(0)
    return schema


def _open_arrow(file: Any, is_file: bool, columns: list[int] | None) -> Any:
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    source = pa.PythonFile(file, mode="r") if not isinstance(file, pa.NativeFile) else file
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source, options=options)


def _arrow_batches(file: Any, columns: list[int]) -> Iterator[pa.RecordBatch]:
    is_file = bytes(file.read(len(_FILE_MAGIC))) == _FILE_MAGIC
    file.seek(0)
    with _open_arrow(file, is_file, columns) as reader:
        numbers = range(reader.num_record_batches) if is_file else None
        for batch in map(reader.get_batch, numbers) if numbers is not None else reader:
            batch.validate(full=True)
            yield batch
