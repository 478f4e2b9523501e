"""The footer of a parquet file: the position of the text column's chunks, in a file that may be damaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.remote.range_reader import ReadOnlyFile
from pipeline.sources.text_columns import find_columns


def text_chunks(metadata: pq.FileMetaData, text_column: str, groups: Iterable[int]) -> list[list[Any]]:
    """The metadata of the text columns' chunks in each of the row groups; ArrowException if they are inconsistent."""
    try:
        leaves = [column.leaf for column in find_columns(metadata.schema.to_arrow_schema(), text_column)]
    except LookupError as error:
        raise pa.ArrowInvalid(f"it {error.args[0]}") from error
    groups = list(groups)
    _require_sound(metadata, leaves, groups)
    chunks = [[metadata.row_group(group).column(leaf) for leaf in leaves] for group in groups]
    for group, columns in zip(groups, chunks, strict=True):
        for chunk in columns:
            if min(chunk.total_uncompressed_size, chunk.total_compressed_size, chunk.num_values) < 0:
                raise pa.ArrowInvalid(f"its footer gives row group {group} a negative size")
    return chunks


def _require_sound(metadata: pq.FileMetaData, leaves: list[int], groups: list[int]) -> None:
    """Raise ArrowException or OSError where the metadata of a chunk contradict each other.

    ``RowGroupMetaData.column`` would end the process, because nothing catches Arrow's C++ exception. The reader catches
    it; with ``pre_buffer`` it checks all chunks before it reads the first byte, and then gets an exception.
    """
    if any(group >= metadata.num_row_groups for group in groups):
        raise pa.ArrowInvalid(f"it has {metadata.num_row_groups} row groups, not {groups[-1] + 1}")
    if any(leaf >= len(metadata.schema) for leaf in leaves):
        raise pa.ArrowInvalid("its schema contradicts itself")
    try:
        with pq.ParquetFile(_NoContent(1 << 60), metadata=metadata, pre_buffer=True) as parquet:
            parquet.reader.read_row_groups(groups, column_indices=leaves, use_threads=False)
    except _ContentAskedForError:
        pass


class _ContentAskedForError(Exception):
    """The metadata of all chunks have been checked."""


class _NoContent(ReadOnlyFile):
    """A file of any size, of which nothing can be read."""

    def read(self, size: int | None = -1) -> bytes:
        raise _ContentAskedForError
