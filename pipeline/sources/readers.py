"""Reading a work item: from parquet, JSON lines, text files and Python modules to Arrow arrays of texts.

A document is a parquet row, a line of JSON, a text file, a documented Python module. Nulls and blank texts are counted
and left out. Memory is bounded by ``_ARRAY_BYTES`` and the largest document, not by the item or its row groups.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.selection import compression_of
from pipeline.sources import docstrings, json_lines, tables
from pipeline.sources.arrow_values import array_of, offsets_of
from pipeline.sources.column_chunks import DAMAGED, SparseFile, by_slice
from pipeline.sources.compressions import unpacked
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.work_items import Damage, FileSlice, WorkItem, explained, open_slice, reading

_ARRAY_BYTES = 2_000_000  # of text per array, so that it stays in the processor's cache until it is encoded
_ROWS = 4096  # largest number of parquet rows per batch
_DICTIONARY_ROWS = 64  # the same for dictionaries, where any row may be the longest text
_DICTIONARY_BYTES = 64_000_000  # largest batch of such rows, if the dictionary is one text that does not compress
_PAGE_BYTES = 1 << 20  # of a column chunk per read
_CHUNK_BYTES = 1 << 20  # of a compressed text file per read

FetchedRanges = list[tuple[int, memoryview]]


def read_item(
    item: WorkItem, skipped: Counter[str], fetched: pa.Table | None = None, damaged: Damage | None = None
) -> Iterator[pa.Array]:
    """The texts of an item, in order, as large_string arrays of at most about 2 MB without nulls or blank texts.

    A larger document has an array to itself. What is left out is counted in ``skipped`` by reason. ``fetched``: what
    ``fetch_column_chunks`` made of the remote files; a slice that is not in it is read from its file. ``damaged`` takes
    a note of every slice that cannot be read whole; the part behind the first damage is left out.

    Raises:
        DamagedInputError: where ``damaged`` is not given.
        UserError: no text under the name of the item's text column; an unreachable file.
    """
    arrays = _slices(item, skipped, fetched, damaged)
    for array in _joined(part for whole in arrays for part in _divided(whole)):
        texts = _without_blanks(array, skipped)
        if len(texts):
            yield texts


def _slices(
    item: WorkItem, skipped: Counter[str], fetched: pa.Table | None, damaged: Damage | None
) -> Iterator[pa.Array]:
    ranges = {} if fetched is None else by_slice(fetched)
    for number, file_slice in enumerate(item.slices):
        try:
            yield from _slice(file_slice, item.text_column, skipped, ranges.get(number, []))
        except UserError as error:
            mended = explained(file_slice, error)
            if damaged is None or not isinstance(mended, DamagedInputError):
                raise mended from error
            damaged.append({"name": file_slice.label, "reason": str(mended)})


def _slice(
    file_slice: FileSlice, text_column: str, skipped: Counter[str], fetched: FetchedRanges
) -> Iterator[pa.Array]:
    if fetched and fetched[0][0] == DAMAGED:
        raise DamagedInputError(bytes(fetched[0][1]).decode())
    with reading(file_slice.where), _open(file_slice, fetched) as file:
        if file_slice.kind == "parquet":
            yield from _parquet(file_slice, text_column, file)
        elif file_slice.kind == "jsonl":
            yield from _json(file_slice, text_column, file, skipped, fetched[0][0] if fetched else None)
        elif file_slice.kind in ("csv", "tsv"):
            yield from _batches(_csv_texts(file_slice, text_column, file, skipped))
        elif file_slice.kind == "arrow":
            for texts in tables.arrow_texts(file_slice, text_column, file):
                yield texts.cast(pa.large_string())
        elif file_slice.kind == "txt":
            yield _text(unpacked(file, file_slice.name), file_slice)
        else:
            yield from _module(file_slice, file, skipped)


def _open(file_slice: FileSlice, fetched: FetchedRanges) -> Any:
    if not fetched:
        return open_slice(file_slice)
    return SparseFile(fetched) if file_slice.kind == "parquet" else pa.BufferReader(fetched[0][1])


# ---- kinds of files --------------------------------------------------------------------------------------------------


def _parquet(file_slice: FileSlice, text_column: str, file: Any) -> Iterator[pa.Array]:
    left = file_slice.max_documents
    # pre_buffer, which is the default, would read whole column chunks ahead
    options = {"buffer_size": _PAGE_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(file, **options) as parquet:
        first_row = sum(parquet.metadata.row_group(group).num_rows for group in range(file_slice.start))
        groups = range(file_slice.start, file_slice.stop)
        for group, chunk in zip(groups, text_chunks(parquet.metadata, text_column, groups), strict=True):
            row = first_row
            for batch in parquet.iter_batches(_rows_at_a_time(chunk), [group], [text_column], use_threads=False):
                texts: Any = batch.column(0)[:left]
                texts = texts.cast(pa.large_string())  # from strings with 32-bit offsets, dictionaries, views
                _require_utf8(texts, file_slice, row)
                yield texts
                row += len(texts)
                if left is not None and (left := left - len(texts)) == 0:
                    return
            first_row += parquet.metadata.row_group(group).num_rows


def _rows_at_a_time(chunk: Any) -> int:
    """Rows that have ``_ARRAY_BYTES`` on average; few if a dictionary hides their sizes."""
    rows = _ROWS
    if chunk.total_uncompressed_size > 0:
        rows = min(rows, _ARRAY_BYTES * chunk.num_values // chunk.total_uncompressed_size)
    if chunk.has_dictionary_page:
        dictionary_bytes = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
        rows = min(rows, _DICTIONARY_ROWS, _DICTIONARY_BYTES // max(1, dictionary_bytes))
    return max(1, rows)


def _require_utf8(texts: pa.Array, file_slice: FileSlice, first_row: int) -> None:
    """Raise DamagedInputError for text that is not UTF-8, which Arrow checks only on request (4 GB/s)."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(texts.cast(pa.large_binary()), first_row):
            _decode(value.as_buffer() if value.is_valid else b"", f"row {row} of {file_slice.where}")
        raise


def _decode(content: Any, where: str) -> None:
    try:
        codecs.decode(content, "utf-8")
    except UnicodeDecodeError as error:
        byte = memoryview(content).cast("B")[error.start]
        raise DamagedInputError(f"{where} is not UTF-8 text: byte {error.start} is {byte:#04x}") from error


def _json(
    file_slice: FileSlice, text_column: str, file: Any, skipped: Counter[str], fetched_from: int | None
) -> Iterator[pa.Array]:
    """``fetched_from``: the position in the whole file where ``file`` begins, if it is a fetched range of it."""
    position, stop = 0, None
    if file_slice.is_range:
        stop = file_slice.stop
        position = json_lines.seek_first_line(file, file_slice.start, stop) if fetched_from is None else fetched_from
    lines = json_lines.read_lines(unpacked(file, file_slice.name), position, stop)
    yield from _batches(_json_texts(file_slice, text_column, lines, skipped))


def _json_texts(
    file_slice: FileSlice, key: str, lines: Iterable[tuple[int, json_lines.Line]], skipped: Counter[str]
) -> Iterator[bytes | pa.Array]:
    records = 0
    with reading(file_slice.where):
        for number, (position, line) in enumerate(lines, 1):
            if json_lines.is_blank(line):
                continue
            if records == file_slice.max_documents:
                return
            records += 1
            try:
                text = json_lines.text_of(line, key)
            except ValueError as error:
                raise DamagedInputError(f"{_place(file_slice, number, position)} {error}") from error
            except LookupError as error:
                raise UserError(f"{_place(file_slice, number, position)} {error.args[0]}") from error
            if text is None:
                skipped["null"] += 1
            else:
                yield text


def _place(file_slice: FileSlice, number: int, position: int) -> str:
    """Where a line is, for messages: its number where all lines before it were read, or else its first byte."""
    is_counted = file_slice.start == 0 or not file_slice.is_range
    return (
        f"line {number} of {file_slice.where}" if is_counted else f"the line at byte {position:,} of {file_slice.where}"
    )


def _csv_texts(file_slice: FileSlice, text_column: str, file: Any, skipped: Counter[str]) -> Iterator[bytes]:
    with reading(file_slice.where):
        for text in tables.csv_texts(file_slice, text_column, file):
            if text is None:
                skipped["null"] += 1
            else:
                yield text


def _text(file: Any, file_slice: FileSlice) -> pa.Array:
    """A file as one document; takes its size in memory once."""
    if compression_of(file_slice.name):
        content = bytearray()
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
    else:
        content = file.read()
    start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
    text = array_of(content, start, len(content), pa.large_string())
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        _decode(memoryview(content)[start:], file_slice.where)
        raise
    return text


def _module(file_slice: FileSlice, file: Any, skipped: Counter[str]) -> Iterator[pa.Array]:
    try:
        document = docstrings.module_document(file_slice.name, file.read())
    except ValueError:  # UnicodeDecodeError too
        skipped["module that cannot be parsed"] += 1
        return
    if document is None:
        skipped["module with little documentation"] += 1
    else:
        yield pa.array([document], pa.large_string())


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _batches(texts: Iterable[bytes | pa.Array]) -> Iterator[pa.Array]:
    """Single texts, UTF-8, as arrays; arrays pass unchanged. An error is raised after the texts before it."""
    batch: list[bytes] = []
    size_bytes = 0
    damage: DamagedInputError | None = None
    try:
        for text in texts:
            if batch and (isinstance(text, pa.Array) or size_bytes + len(text) > _ARRAY_BYTES):
                yield pa.array(batch, pa.large_binary()).view(pa.large_string())
                batch, size_bytes = [], 0
            if isinstance(text, pa.Array):
                yield text
            else:
                batch.append(text)
                size_bytes += len(text)
    except DamagedInputError as error:
        damage = error
    if batch:
        yield pa.array(batch, pa.large_binary()).view(pa.large_string())
    if damage:
        raise damage


def _divided(texts: pa.Array) -> Iterator[pa.Array]:
    """The texts in slices of at most ``_ARRAY_BYTES``, or of one text."""
    offsets = offsets_of(texts)
    begin = 0
    while begin < len(texts):
        end = int(np.searchsorted(offsets, offsets[begin] + _ARRAY_BYTES, side="right")) - 1
        end = max(end, begin + 1)
        yield texts[begin:end]
        begin = end


def _joined(arrays: Iterable[pa.Array]) -> Iterator[pa.Array]:
    """Small neighbouring arrays concatenated up to ``_ARRAY_BYTES``."""
    waiting: list[pa.Array] = []
    waiting_bytes = 0
    for array in arrays:
        offsets = offsets_of(array)
        size_bytes = int(offsets[-1] - offsets[0])
        if waiting and waiting_bytes + size_bytes > _ARRAY_BYTES:
            yield pa.concat_arrays(waiting) if len(waiting) > 1 else waiting[0]
            waiting, waiting_bytes = [], 0
        waiting.append(array)
        waiting_bytes += size_bytes
    if waiting:
        yield pa.concat_arrays(waiting) if len(waiting) > 1 else waiting[0]


def _without_blanks(texts: Any, skipped: Counter[str]) -> Any:
    if texts.null_count:
        skipped["null"] += texts.null_count
        texts = texts.drop_null()
    is_blank: Any = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0))  # trimming would copy them
    if is_blank.true_count:
        skipped["blank"] += is_blank.true_count
        texts = texts.filter(pc.invert(is_blank))
    return texts
