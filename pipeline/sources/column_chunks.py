"""The bytes that a work item needs of remote files, in a table: fetched in one task, read in another.

Of a parquet file that is the footer and the text column's chunks of the row groups, of plain JSON lines the lines that
begin in the range, of any other file all of it. A slice above 1 GB is left out: readers.py streams it.
"""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError
from pipeline.remote.range_reader import ReadOnlyFile
from pipeline.sources import documents, json_lines
from pipeline.sources.arrow_values import array_of, values_of
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.work_items import FileSlice, WorkItem, reading

SCHEMA = pa.schema([("slice", pa.int32()), ("start", pa.int64()), ("data", pa.large_binary())])
"""Number of the slice in the item; position in the file, or DAMAGED; the bytes, or why they cannot be read."""
DAMAGED = -1

_MAX_SLICE_BYTES = 1_000_000_000
_READ_BYTES = 1 << 26  # per read
_GAP_BYTES = 1 << 20  # between two chunks of a column that one read covers
_TAIL_BYTES = 1 << 16  # of a parquet file, where the footer is
_PADDING_BYTES = 100  # behind a chunk, which Arrow also reads in files of old writers

FetchedRange = tuple[int, bytes | bytearray | memoryview]
OpenFile = Callable[[FileSlice], BinaryIO]


class SparseFile(ReadOnlyFile):
    """A file of which some ranges are there; reading anything else is an OSError."""

    def __init__(self, fetched: Sequence[tuple[int, Any]]) -> None:
        ordered = sorted(fetched, key=lambda part: part[0])
        self._starts = [start for start, _ in ordered]
        self._parts = [memoryview(data) for _, data in ordered]
        super().__init__(max(start + len(part) for start, part in zip(self._starts, self._parts, strict=True)))

    def read(self, size: int | None = -1) -> bytes:
        if not (num_bytes := self.bytes_ahead(size)):
            return b""
        number = bisect.bisect_right(self._starts, self._position) - 1
        begin = self._position - self._starts[number]
        if number < 0 or begin + num_bytes > len(self._parts[number]):
            raise OSError(f"bytes {self._position}-{self._position + num_bytes} were not fetched")
        self._position += num_bytes
        return bytes(self._parts[number][begin : begin + num_bytes])


def fetch_column_chunks(item: WorkItem, open_file: OpenFile) -> pa.Table:
    """Fetch what reading ``item`` takes of its remote files: a table of SCHEMA, ordered by slice and position.

    ``open_file`` opens the file of a slice, from a cache or over the network; reads are few and large. An error of a
    file is a row of the table, which ``readers.read_item`` raises.
    """
    rows: list[tuple[int, int, Any]] = []
    for number, file_slice in enumerate(item.slices):
        if file_slice.file is None:
            continue
        try:
            with reading(file_slice.where), open_file(file_slice) as file:
                rows += [(number, start, data) for start, data in _fetched_ranges(file_slice, item, file)]
        except DamagedInputError as error:
            rows.append((number, DAMAGED, str(error).encode()))
    data = pa.chunked_array([array_of(data, 0, len(data), pa.large_binary()) for _, _, data in rows], pa.large_binary())
    columns = [pa.array([row[column] for row in rows], SCHEMA.field(column).type) for column in (0, 1)]
    return pa.table([*columns, data], schema=SCHEMA)


def needed_bytes(items: Sequence[WorkItem], open_file: OpenFile) -> int:
    """Estimate what ``fetch_column_chunks`` would read for all items; reads the footers of parquet files.

    Compared with the size of the file, it tells whether to fetch the file whole. Raises DamagedInputError for a bad
    footer.
    """
    total = 0
    footers: dict[str, Any] = {}
    for item in items:
        for file_slice in item.slices:
            if file_slice.kind == "parquet":
                if file_slice.where not in footers:
                    with reading(file_slice.where), open_file(file_slice) as file:
                        footers[file_slice.where] = pq.read_metadata(SparseFile([_read_tail(file)]))
                groups = range(file_slice.start, file_slice.stop)
                with reading(file_slice.where):
                    chunks = text_chunks(footers[file_slice.where], item.text_column, groups)
                total += sum(chunk.total_compressed_size for columns in chunks for chunk in columns)
            elif file_slice.file is not None:
                total += file_slice.stop - file_slice.start if file_slice.is_range else file_slice.file.size_bytes
    return total + sum(footer.serialized_size for footer in footers.values())


def by_slice(fetched: pa.Table) -> dict[int, list[tuple[int, memoryview]]]:
    """(start, data) of every slice that was not left out, without a copy of the data."""
    found: dict[int, list[tuple[int, memoryview]]] = {}
    rows = itertools.chain.from_iterable(values_of(chunk) for chunk in fetched["data"].chunks)
    slices, starts = fetched["slice"].to_pylist(), fetched["start"].to_pylist()
    for file_slice, start, data in zip(slices, starts, rows, strict=True):
        found.setdefault(file_slice, []).append((start, data))
    return found


def _fetched_ranges(file_slice: FileSlice, item: WorkItem, file: BinaryIO) -> list[FetchedRange]:
    if file_slice.kind == "parquet":
        return list(_parquet_ranges(file_slice, item.text_column, file))
    if file_slice.is_range and file_slice.kind == "documents":
        return _document_ranges(file_slice, documents.Separator(item.rules.document_separator or ""), file)
    if file_slice.is_range:
        return _line_ranges(file_slice, file)
    size_bytes = file_slice.file.size_bytes if file_slice.file else 0
    return [] if size_bytes > _MAX_SLICE_BYTES else [(0, _read(file, 0, size_bytes))]


def _parquet_ranges(file_slice: FileSlice, text_column: str, file: BinaryIO) -> Iterator[FetchedRange]:
    tail = _read_tail(file)
    metadata = pq.read_metadata(SparseFile([tail]))
    chunks = text_chunks(metadata, text_column, range(file_slice.start, file_slice.stop))
    ranges = [_chunk_range(chunk) for columns in chunks for chunk in columns]
    file_bytes = tail[0] + len(tail[1])
    for start, stop in ranges:
        if not 0 <= start <= stop <= file_bytes:
            raise OSError(f"its footer names bytes {start}-{stop} of {file_bytes}")
    if sum(stop - start for start, stop in ranges) + len(tail[1]) > _MAX_SLICE_BYTES:
        return
    for group in _near(sorted((start, min(stop + _PADDING_BYTES, file_bytes)) for start, stop in ranges)):
        first, last = group[0][0], max(stop for _, stop in group)
        content = memoryview(_read(file, first, last))
        for start, stop in group:  # the bytes between them are dropped
            yield start, bytes(content[start - first : stop - first]) if len(group) > 1 else content
    yield tail


def _read_tail(file: BinaryIO) -> FetchedRange:
    """The end of a parquet file, including the footer."""
    size_bytes = file.seek(0, io.SEEK_END)
    start = max(0, size_bytes - _TAIL_BYTES)
    tail = _read(file, start, size_bytes)
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8  # its length and a magic number follow it
    if len(tail) < footer_bytes <= size_bytes:
        start = size_bytes - footer_bytes
        tail = _read(file, start, size_bytes)
    return start, tail


def _chunk_range(chunk: Any) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    return start, start + chunk.total_compressed_size


def _near(ranges: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Groups of ranges that one read fetches: with small gaps, and ``_READ_BYTES`` in all."""
    group: list[tuple[int, int]] = []
    for start, stop in ranges:
        if group and (start - group[-1][1] > _GAP_BYTES or stop - group[0][0] > _READ_BYTES):
            yield group
            group = []
        group.append((start, stop))
    if group:
        yield group


def _line_ranges(file_slice: FileSlice, file: BinaryIO) -> list[FetchedRange]:
    """The lines that begin in the range, as one range that starts with the first of them."""
    start = json_lines.seek_first_line(file, file_slice.start, file_slice.stop)
    content = bytearray()
    if start < file_slice.stop <= start + _MAX_SLICE_BYTES:
        content = _read(file, start, file_slice.stop)
        while len(content) <= _MAX_SLICE_BYTES and not content.endswith(b"\n"):  # up to the end of the last line
            if not (chunk := file.read(_GAP_BYTES)):
                break
            content += chunk[: chunk.find(b"\n") + 1 or None]
    return [] if max(file_slice.stop - start, len(content)) > _MAX_SLICE_BYTES else [(start, content)]


def _document_ranges(file_slice: FileSlice, separator: documents.Separator, file: BinaryIO) -> list[FetchedRange]:
    """The documents that begin in the range, as one range that starts with the first of them."""
    start = documents.seek_first_document(file, file_slice.start, file_slice.stop, separator)
    content, searched = bytearray(), 0
    if start < file_slice.stop <= start + _MAX_SLICE_BYTES:
        content = _read(file, start, file_slice.stop)
        searched = max(0, len(content) - separator.reach)
        while len(content) <= _MAX_SLICE_BYTES:  # up to a separator that ends behind the range
            ends = [end for _, end in separator.spans(content, searched) if start + end >= file_slice.stop]
            if ends and ends[0] < len(content):
                del content[ends[0] :]
                break
            if not (chunk := file.read(_GAP_BYTES)):
                break
            content += chunk
    return [] if max(file_slice.stop - start, len(content)) > _MAX_SLICE_BYTES else [(start, content)]


def _read(file: BinaryIO, start: int, stop: int) -> bytearray:
    """Bytes [start, stop), in memory once; raises OSError where the file ends before ``stop``."""
    content = bytearray(stop - start)
    position = 0
    file.seek(start)
    while position < len(content):
        part = file.read(min(len(content) - position, _READ_BYTES))
        if not part:
            raise OSError(f"it ends at byte {start + position}, not {stop}")
        content[position : position + len(part)] = part
        position += len(part)
    return content
