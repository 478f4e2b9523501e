"""What a work item needs of remote files, as bytes in a table: fetched in one task, read in another.

Of a parquet file that is the footer and the text column's chunks of the row groups, of plain JSON lines those that
begin in the range, of any other file all of it. A piece above 1 GB stays out: readers.py streams it.
"""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError
from pipeline.sources import json_lines
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.work_items import Piece, WorkItem, reading

SCHEMA = pa.schema([("piece", pa.int32()), ("start", pa.int64()), ("data", pa.large_binary())])
"""Which piece of the item; where in the file, or DAMAGED; what stands there, or why it cannot be read."""
DAMAGED = -1

_MAX_PIECE_BYTES = 1_000_000_000
_READ_BYTES = 1 << 26  # at a time
_GAP_BYTES = 1 << 20  # between two chunks of a column, read rather than asked for twice
_TAIL_BYTES = 1 << 16  # of a parquet file, which is what Arrow reads first to find the footer
_PADDING_BYTES = 100  # that Arrow reads behind a chunk in files of old writers

Segment = tuple[int, bytes | bytearray | memoryview]
OpenFile = Callable[[Piece], BinaryIO]


class SegmentFile(io.RawIOBase):
    """A file of which some parts are there; reading anything else is an OSError."""

    def __init__(self, segments: Sequence[tuple[int, Any]]) -> None:
        ordered = sorted(segments, key=lambda segment: segment[0])
        self._starts = [start for start, _ in ordered]
        self._parts = [memoryview(data) for _, data in ordered]
        self._size = max(start + len(part) for start, part in zip(self._starts, self._parts, strict=True))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._position + size, self._size)
        if stop <= self._position:
            return b""
        number = bisect.bisect_right(self._starts, self._position) - 1
        begin = self._position - self._starts[number]
        if number < 0 or stop - self._starts[number] > len(self._parts[number]):
            raise OSError(f"bytes {self._position}-{stop} were not fetched")
        self._position = stop
        return bytes(self._parts[number][begin : stop - self._starts[number]])


def gather(item: WorkItem, open_file: OpenFile) -> pa.Table:
    """What reading ``item`` takes of its remote files, ordered by piece and place; see SCHEMA.

    ``open_file`` gives a file of a piece, from a cache or over the network; reads are few and large. What is wrong with
    a file is told in the table, for ``readers.read_item`` to raise.
    """
    rows: list[tuple[int, int, Any]] = []
    for number, piece in enumerate(item.pieces):
        if piece.file is None:
            continue
        try:
            with reading(piece.where), open_file(piece) as file:
                rows += [(number, start, data) for start, data in _segments(piece, item.text_column, file)]
        except DamagedInputError as error:
            rows.append((number, DAMAGED, str(error).encode()))
    data = pa.chunked_array([_as_array(data) for _, _, data in rows], pa.large_binary())  # not one array: no copy
    columns = [pa.array([row[column] for row in rows], SCHEMA.field(column).type) for column in (0, 1)]
    return pa.table([*columns, data], schema=SCHEMA)


def needed_bytes(items: Sequence[WorkItem], open_file: OpenFile) -> int:
    """What ``gather`` would read for all of them, about; takes the footers of parquet files.

    Tells, beside the size of the file, whether to fetch it whole. Raises DamagedInputError for a bad footer.
    """
    total = 0
    footers: dict[str, Any] = {}
    for item in items:
        for piece in item.pieces:
            if piece.kind == "parquet":
                if piece.where not in footers:
                    with reading(piece.where), open_file(piece) as file:
                        footers[piece.where] = pq.read_metadata(SegmentFile([_read_tail(file)]))
                groups = range(piece.start, piece.stop)
                with reading(piece.where):
                    chunks = text_chunks(footers[piece.where], item.text_column, groups)
                total += sum(chunk.total_compressed_size for chunk in chunks)
            elif piece.file is not None:
                total += piece.stop - piece.start if piece.is_range else piece.file.size_bytes
    return total + sum(footer.serialized_size for footer in footers.values())


def by_piece(gathered: pa.Table) -> dict[int, list[tuple[int, pa.Buffer]]]:
    """(start, data) of every piece that was not left out. The data is not copied, as scalars would be."""
    found: dict[int, list[tuple[int, pa.Buffer]]] = {}
    rows = itertools.chain.from_iterable(_buffers(chunk) for chunk in gathered["data"].chunks)
    pieces, starts = gathered["piece"].to_pylist(), gathered["start"].to_pylist()
    for piece, start, data in zip(pieces, starts, rows, strict=True):
        found.setdefault(piece, []).append((start, data))
    return found


def _buffers(values: Any) -> Iterator[pa.Buffer]:
    """Every value of a large_binary array as a slice of its buffer."""
    _, offsets, data = values.buffers()
    edges = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1].tolist()
    return ((data or pa.py_buffer(b"")).slice(begin, end - begin) for begin, end in itertools.pairwise(edges))


def _as_array(data: Any) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, len(data)]))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)])


def _segments(piece: Piece, text_column: str, file: BinaryIO) -> list[Segment]:
    if piece.kind == "parquet":
        return list(_parquet_segments(piece, text_column, file))
    if piece.is_range:
        return _line_segments(piece, file)
    size_bytes = piece.file.size_bytes if piece.file else 0
    return [] if size_bytes > _MAX_PIECE_BYTES else [(0, _read(file, 0, size_bytes))]


def _parquet_segments(piece: Piece, text_column: str, file: BinaryIO) -> Iterator[Segment]:
    tail = _read_tail(file)
    metadata = pq.read_metadata(SegmentFile([tail]))
    ranges = [_chunk_range(chunk) for chunk in text_chunks(metadata, text_column, range(piece.start, piece.stop))]
    file_bytes = tail[0] + len(tail[1])
    for start, stop in ranges:
        if not 0 <= start <= stop <= file_bytes:
            raise OSError(f"its footer names bytes {start}-{stop} of {file_bytes}")
    if sum(stop - start for start, stop in ranges) + len(tail[1]) > _MAX_PIECE_BYTES:
        return
    for group in _near(sorted((start, min(stop + _PADDING_BYTES, file_bytes)) for start, stop in ranges)):
        first, last = group[0][0], max(stop for _, stop in group)
        content = memoryview(_read(file, first, last))
        for start, stop in group:  # what lies between is dropped
            yield start, bytes(content[start - first : stop - first]) if len(group) > 1 else content
    yield tail


def _read_tail(file: BinaryIO) -> Segment:
    """The end of a parquet file, footer included."""
    size_bytes = file.seek(0, io.SEEK_END)
    start = max(0, size_bytes - _TAIL_BYTES)
    tail = _read(file, start, size_bytes)
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8  # its length and a magic number stand behind it
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
    """Ranges that are worth one read: small gaps, ``_READ_BYTES`` together."""
    group: list[tuple[int, int]] = []
    for start, stop in ranges:
        if group and (start - group[-1][1] > _GAP_BYTES or stop - group[0][0] > _READ_BYTES):
            yield group
            group = []
        group.append((start, stop))
    if group:
        yield group


def _line_segments(piece: Piece, file: BinaryIO) -> list[Segment]:
    """The lines that begin in the range, as one segment that starts with the first of them."""
    start = json_lines.seek_first_line(file, piece.start, piece.stop)
    content = bytearray()
    if start < piece.stop <= start + _MAX_PIECE_BYTES:
        content = _read(file, start, piece.stop)
        while len(content) <= _MAX_PIECE_BYTES and not content.endswith(b"\n"):  # the last line, to its end
            if not (chunk := file.read(_GAP_BYTES)):
                break
            content += chunk[: chunk.find(b"\n") + 1 or None]
    return [] if max(piece.stop - start, len(content)) > _MAX_PIECE_BYTES else [(start, content)]


def _read(file: BinaryIO, start: int, stop: int) -> bytearray:
    """Bytes [start, stop), held once; raises OSError where the file ends before."""
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
