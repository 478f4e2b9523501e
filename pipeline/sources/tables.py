"""Tables that are read whole: .csv and .tsv with a named column, .arrow and .feather.

Rows of comma-separated values may span lines, so neither they nor Arrow's streams can be divided without reading them.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import DamagedInputError, UserError
from pipeline.sources.compressions import unpacked
from pipeline.sources.work_items import FileSlice, open_slice, reading

_FILE_MAGIC = b"ARROW1"
_OLD_FEATHER_MAGIC = b"FEA1"
_MAX_FIELD_CHARS = 1 << 31


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type holds text, dictionary-encoded or not."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or arrow_type == pa.string_view()
    )


def check_table(whole: FileSlice, text_column: str) -> None:
    """Raise UserError where a table has no text in the column, by its first bytes."""
    with reading(whole.where), open_slice(whole) as file:
        if whole.kind == "arrow":
            _arrow_column(_arrow_schema(file, whole), text_column, whole)
        else:
            _csv_column(_csv_rows(file, whole), text_column, whole)


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


def csv_texts(file_slice: FileSlice, text_column: str, file: Any) -> Iterator[bytes | None]:
    """The texts of a .csv or .tsv file, UTF-8; None for a row that ends before the column. Blank lines are no rows."""
    rows = filter(None, _csv_rows(file, file_slice))
    column = _csv_column(rows, text_column, file_slice)
    for row in itertools.islice(rows, file_slice.max_documents):
        yield row[column].encode() if column < len(row) else None


def arrow_texts(file_slice: FileSlice, text_column: str, file: Any) -> Iterator[pa.Array]:
    """The text column of an Arrow stream or file, batch by batch, checked to be sound and UTF-8."""
    left = file_slice.max_documents
    column = _arrow_column(_arrow_schema(file, file_slice), text_column, file_slice)
    for batch in _arrow_batches(file, [column]):
        texts = batch.column(0)[:left]
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


def _csv_column(rows: Iterator[list[str]], text_column: str, file_slice: FileSlice) -> int:
    """Number of the column; 0 where the file is empty."""
    names = next(filter(None, rows), [])
    if names and text_column not in names:
        raise UserError(_missing(file_slice, text_column, names))
    return names.index(text_column) if names else 0


def _missing(file_slice: FileSlice, text_column: str, names: list[str]) -> str:
    return f"{file_slice.where} has no column {text_column!r}, only {', '.join(names)}; name one with --text_column"


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


def _arrow_column(schema: pa.Schema, text_column: str, file_slice: FileSlice) -> int:
    if text_column not in schema.names:
        raise UserError(_missing(file_slice, text_column, schema.names))
    arrow_type = schema.field(text_column).type
    if not is_text(arrow_type):
        where = f"column {text_column!r} of {file_slice.where}"
        raise UserError(f"{where} holds {arrow_type}, not text; name another with --text_column")
    return schema.names.index(text_column)
