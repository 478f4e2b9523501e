"""Reading a work item: from parquet, JSON lines, text files and Python modules to Arrow arrays of texts.

A document is a parquet row, a line of JSON, a text file, a documented Python module. Nulls and blank texts are counted
and left out. Memory is bounded by ``_ARRAY_BYTES`` and the largest document, not by the item or its row groups.
"""

from __future__ import annotations

import codecs
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.selection import compression_of
from pipeline.sources import docstrings, documents, json_lines, tables
from pipeline.sources.arrow_values import array_of, offsets_of
from pipeline.sources.column_chunks import DAMAGED, SparseFile, by_slice
from pipeline.sources.compressions import unpacked
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.text_columns import Column, find_columns, joined_texts
from pipeline.sources.work_items import (
    NOT_UTF8,
    TOO_LARGE,
    Damage,
    DocumentRules,
    ExpansionError,
    FileSlice,
    LeftOut,
    RecordError,
    WorkItem,
    explained,
    open_slice,
    reading,
    stored_bytes,
)

A = TypeVar("A")

_ARRAY_BYTES = 2_000_000  # of text per array, so that it stays in the processor's cache until it is encoded
_ROWS = 4096  # largest number of parquet rows per batch
_DICTIONARY_ROWS = 64  # the same for dictionaries, where any row may be the longest text
_DICTIONARY_BYTES = 64_000_000  # largest batch of such rows, if the dictionary is one text that does not compress
_PAGE_BYTES = 1 << 20  # of a column chunk per read
_CHUNK_BYTES = 1 << 20  # of a compressed text file per read
_GIANT_CELL_BYTES = 64_000_000

MOST_EXPANSION = 100  # of one record; text has 3 to 10
EXPANDED_BYTES = 256_000_000  # of one record, which are read however far it expands

FetchedRanges = list[tuple[int, memoryview]]


def read_item(
    item: WorkItem,
    skipped: Counter[str],
    fetched: pa.Table | None = None,
    damaged: Damage | None = None,
    first_bad: dict[str, str] | None = None,
    *,
    open_file: Callable[[FileSlice], Any] = open_slice,
) -> Iterator[pa.Array]:
    """The texts of an item, in order, as large_string arrays of at most about 2 MB without nulls or blank texts.

    A larger document has an array to itself. What is left out is counted in ``skipped`` by reason. ``fetched``: what
    ``fetch_column_chunks`` made of the remote files; a slice that is not in it is read from its file. ``damaged`` takes
    a note of every slice that cannot be read whole; the part behind the first damage is left out. ``first_bad`` takes a
    sentence about the first record without text for every reason; such records are counted and left out. ``open_file``
    opens the files that are not in ``fetched``.

    Raises:
        DamagedInputError: where ``damaged`` is not given; for a record that is none where ``first_bad`` is not given.
        UserError: no text under the name of the item's text column, where ``first_bad`` is not given; an unreachable
            file.
    """
    left_out = LeftOut(counts=skipped, first=first_bad)

    def read(file_slice: FileSlice, file: Any, start: int | None) -> Iterator[pa.Array]:
        return _slice(file_slice, item, file, left_out, start)

    arrays = read_slices(item, fetched, damaged, read, open_file)
    for array in _joined(part for whole in arrays for part in _divided(whole)):
        texts = _without_blanks(array, skipped)
        if item.rules.max_document_bytes is not None:
            texts = _without_large(texts, item.rules.max_document_bytes, skipped)
        if len(texts):
            yield texts


def read_slices(
    item: WorkItem,
    fetched: pa.Table | None,
    damaged: Damage | None,
    read: Callable[[FileSlice, Any, int | None], Iterator[A]],
    open_file: Callable[[FileSlice], Any] = open_slice,
) -> Iterator[A]:
    """What ``read`` makes of every slice; arguments and errors as of ``read_item``.

    read: from a slice, its opened file, and the position in the whole file where that begins, if it is a fetched range.
    """
    ranges = {} if fetched is None else by_slice(fetched)
    for number, file_slice in enumerate(item.slices):
        part = ranges.get(number, [])
        try:
            if part and part[0][0] == DAMAGED:
                raise DamagedInputError(bytes(part[0][1]).decode())
            with reading(file_slice.where), _open(file_slice, part, open_file) as file:
                yield from read(file_slice, file, part[0][0] if part else None)
        except UserError as error:
            mended = explained(file_slice, error)
            if damaged is None or not isinstance(mended, DamagedInputError):
                raise mended from error
            damaged.append({"name": file_slice.label, "reason": str(mended)})


def _slice(
    file_slice: FileSlice, item: WorkItem, file: Any, left_out: LeftOut, start: int | None
) -> Iterator[pa.Array]:
    if file_slice.kind == "parquet":
        yield from _parquet(file_slice, item, file, left_out)
    elif file_slice.kind == "jsonl":
        yield from _batches(_json_texts(file_slice, item, file, left_out, start))
    elif file_slice.kind == "documents":
        yield from _batches(_document_texts(file_slice, item.rules, file, left_out, start))
    elif file_slice.kind in ("csv", "tsv"):
        yield from _batches(_csv_texts(file_slice, item, file, left_out.counts))
    elif file_slice.kind == "arrow":
        yield from tables.arrow_texts(file_slice, item, file)
    elif file_slice.kind == "txt":
        yield from _text(file, file_slice, item.rules.max_document_bytes, left_out)
    else:
        yield from _module(file_slice, file, left_out.counts)


def _open(file_slice: FileSlice, fetched: FetchedRanges, open_file: Callable[[FileSlice], Any]) -> Any:
    if not fetched:
        return open_file(file_slice)
    return SparseFile(fetched) if file_slice.kind == "parquet" else pa.BufferReader(fetched[0][1])


# ---- parquet ---------------------------------------------------------------------------------------------------------


def _parquet(file_slice: FileSlice, item: WorkItem, file: Any, left_out: LeftOut) -> Iterator[pa.Array]:
    for row, batch, columns in parquet_rows(file_slice, item, file):
        texts: Any = joined_texts(batch, columns, item.rules.column_separator)
        yield _checked_utf8(texts, file_slice, row, left_out)


def parquet_rows(
    file_slice: FileSlice, item: WorkItem, file: Any
) -> Iterator[tuple[int, pa.RecordBatch, list[Column]]]:
    """The rows of a slice of a parquet file in batches: number of the first one, values, and their columns."""
    left = file_slice.max_documents
    # pre_buffer, which is the default, would read whole column chunks ahead
    options = {"buffer_size": _PAGE_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(file, **options) as parquet:
        columns = _columns(file_slice, item, parquet.metadata)
        first_row = sum(parquet.metadata.row_group(group).num_rows for group in range(file_slice.start))
        groups = range(file_slice.start, file_slice.stop)
        for group, chunks in zip(groups, text_chunks(parquet.metadata, item.text_column, groups), strict=True):
            row = first_row
            for chunk in chunks:
                _require_modest_cells(chunk, f"row group {group} of {file_slice.where}")
            rows = min(map(_rows_at_a_time, chunks))
            for batch in _row_batches(parquet, rows, group, [column.leaf for column in columns]):
                part = batch.slice(0, left)
                yield row, part, columns
                row += len(part)
                if left is not None and (left := left - len(part)) == 0:
                    return
            first_row += parquet.metadata.row_group(group).num_rows


def _columns(file_slice: FileSlice, item: WorkItem, metadata: pq.FileMetaData) -> list[Column]:
    try:
        return find_columns(metadata.schema.to_arrow_schema(), item.text_column)
    except LookupError as error:  # the file was changed since the plan was made
        raise DamagedInputError(f"{file_slice.where} {error.args[0]}") from error


def _row_batches(parquet: pq.ParquetFile, rows: int, group: int, leaves: list[int]) -> Iterator[pa.RecordBatch]:
    """By the numbers of columns, because a path such as data.text may be that of two."""
    yield from parquet.reader.iter_batches(rows, row_groups=[group], column_indices=leaves, use_threads=False)


def _rows_at_a_time(chunk: Any) -> int:
    """Rows that have ``_ARRAY_BYTES`` on average; few if a dictionary hides their sizes."""
    rows = _ROWS
    if chunk.total_uncompressed_size > 0:
        rows = min(rows, _ARRAY_BYTES * chunk.num_values // chunk.total_uncompressed_size)
    if chunk.has_dictionary_page:
        dictionary_bytes = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
        if chunk.total_uncompressed_size > MOST_EXPANSION * chunk.total_compressed_size:
            dictionary_bytes = chunk.total_uncompressed_size
        rows = min(rows, _DICTIONARY_ROWS, _DICTIONARY_BYTES // max(1, dictionary_bytes))
    return max(1, rows)


def _require_modest_cells(chunk: Any, where: str) -> None:
    """Raise DamagedInputError for cells that take far more memory than their place in the file suggests."""
    unpacked_bytes, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
    largest = max(EXPANDED_BYTES, MOST_EXPANSION * stored)
    if unpacked_bytes > largest and unpacked_bytes > _GIANT_CELL_BYTES * chunk.num_values:
        raise DamagedInputError(
            f"{where} holds {chunk.num_values:,} cells of {unpacked_bytes / 1e6:,.0f} MB in {stored / 1e6:,.2f} MB: "
            f"cells that expand to more than {MOST_EXPANSION} times their place in the file are not read, because few "
            "machines have the memory; write them without compression if they are meant, or leave them out with "
            "--skip_bad_files"
        )


def _checked_utf8(texts: pa.Array, file_slice: FileSlice, first_row: int, left_out: LeftOut) -> pa.Array:
    """The rows that are UTF-8, which Arrow checks only on request (4 GB/s); the others are bad records."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        is_good = np.ones(len(texts), bool)
        for row, value in enumerate(texts.cast(pa.large_binary())):
            if problem := _utf8_problem(value.as_buffer() if value.is_valid else b""):
                left_out.add_bad(problem, f"row {first_row + row}", file_slice)
                is_good[row] = False
        if is_good.all():
            raise
        texts = texts.cast(pa.large_binary()).filter(pa.array(is_good)).cast(pa.large_string())
    return texts


def _utf8_problem(content: Any) -> RecordError | None:
    try:
        codecs.decode(content, "utf-8")
    except UnicodeDecodeError as error:
        byte = memoryview(content).cast("B")[error.start]
        return RecordError(f"is not UTF-8 text: byte {error.start} is {byte:#04x}", NOT_UTF8)
    return None


# ---- lines and texts -------------------------------------------------------------------------------------------------


def _json_texts(
    file_slice: FileSlice, item: WorkItem, file: Any, left_out: LeftOut, fetched_from: int | None
) -> Iterator[bytes | pa.Array]:
    for place, line in json_records(file_slice, file, fetched_from):
        try:
            text = json_lines.text_of(line, item.text_column, item.rules.column_separator)
        except RecordError as error:
            left_out.add_bad(error, place, file_slice)
            continue
        if text is None:
            left_out.counts["null"] += 1
        else:
            yield text


def json_records(file_slice: FileSlice, file: Any, fetched_from: int | None) -> Iterator[tuple[str, bytes | bytearray]]:
    """The lines of a slice that are not blank, each with its place for messages.

    fetched_from: the position in the whole file where ``file`` begins, if it is a fetched range of it.
    """
    position, stop = 0, None
    if file_slice.is_range:
        stop = file_slice.stop
        position = json_lines.seek_first_line(file, file_slice.start, stop) if fetched_from is None else fetched_from
    content, limit = unpacked(file, file_slice.name), largest_record(file_slice)
    records = 0
    with reading(file_slice.where), _expansion_explained(file_slice):
        for number, (place, line) in enumerate(json_lines.read_lines(content, position, stop, limit), 1):
            if json_lines.is_blank(line):
                continue
            if records == file_slice.max_documents:
                return
            records += 1
            yield _place("line", file_slice, number, place), line


def _document_texts(
    file_slice: FileSlice, rules: DocumentRules, file: Any, left_out: LeftOut, fetched_from: int | None
) -> Iterator[bytes | pa.Array]:
    """The documents of a text file between separators; ``fetched_from`` as for lines."""
    separator = documents.Separator(rules.document_separator or "")
    position, stop = 0, None
    if file_slice.is_range:
        stop = file_slice.stop
        position = fetched_from or 0
        if fetched_from is None:
            position = documents.seek_first_document(file, file_slice.start, stop, separator)
    content = unpacked(file, file_slice.name)
    found = documents.read_documents(
        content, position, stop, separator, max_bytes=rules.max_document_bytes, limit=largest_record(file_slice)
    )
    with reading(file_slice.where), _expansion_explained(file_slice):
        for number, (place, text) in enumerate(found, 1):
            if number - 1 == file_slice.max_documents:
                return
            if text is None:
                left_out.counts[TOO_LARGE] += 1
            elif problem := _document_problem(text):
                left_out.add_bad(problem, _place("document", file_slice, number, place), file_slice)
            else:
                yield text


def _csv_texts(file_slice: FileSlice, item: WorkItem, file: Any, skipped: Counter[str]) -> Iterator[bytes]:
    with reading(file_slice.where):
        for text in tables.csv_texts(file_slice, item, file):
            if text is None:
                skipped["null"] += 1
            else:
                yield text


def _document_problem(text: bytes | pa.Array) -> RecordError | None:
    if isinstance(text, bytes):
        return None if text.isascii() else _utf8_problem(text)
    return _utf8_problem(text[0].as_buffer())


def _place(record: str, file_slice: FileSlice, number: int, position: int) -> str:
    """Where a record is, for messages: its number where all before it were read, or else its first byte."""
    is_counted = file_slice.start == 0 or not file_slice.is_range
    return f"{record} {number}" if is_counted else f"the {record} at byte {position:,}"


def largest_record(file_slice: FileSlice) -> int:
    """Most bytes of one line or document: in a compressed file, some hundred times its size, or 256 MB."""
    if compression_of(file_slice.name) is None:
        return 1 << 62
    return max(EXPANDED_BYTES, MOST_EXPANSION * stored_bytes(file_slice))


@contextlib.contextmanager
def _expansion_explained(file_slice: FileSlice) -> Iterator[None]:
    """Turn an ExpansionError into a sentence about the file."""
    try:
        yield
    except ExpansionError as error:
        raise DamagedInputError(
            f"{file_slice.where} {error}, though it is only {stored_bytes(file_slice) / 1e6:,.2f} MB itself: what "
            f"expands to more than {MOST_EXPANSION} times its size is not read, because few machines have the memory; "
            "unpack the file if it is meant, or leave it out with --skip_bad_files"
        ) from error


def _text(file: Any, file_slice: FileSlice, max_bytes: int | None, left_out: LeftOut) -> Iterator[pa.Array]:
    """A file as one document; takes its size in memory once. Of one above ``max_bytes`` no more than that is read."""
    most = 1 << 62 if max_bytes is None else max_bytes + len(codecs.BOM_UTF8)
    if compression_of(file_slice.name):
        with _expansion_explained(file_slice):
            content = _unpacked_text(unpacked(file, file_slice.name), most, largest_record(file_slice))
    else:
        content = file.read() if max_bytes is None or stored_bytes(file_slice) <= most else None
    if content is None:
        left_out.counts[TOO_LARGE] += 1
        return
    start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
    text = array_of(content, start, len(content), pa.large_string())
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        if problem := _utf8_problem(memoryview(content)[start:]):
            raise DamagedInputError(f"{file_slice.where} {problem}") from problem
        raise
    yield text


def _unpacked_text(stream: Any, most: int, limit: int) -> bytearray | None:
    """All of a stream; None if it is longer than ``most``, ExpansionError if longer than ``limit``."""
    content = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > most:
            return None
        if len(content) > limit:
            raise ExpansionError(f"has a text of more than {limit / 1e6:,.0f} MB")
    return content


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


def _without_large(texts: Any, max_bytes: int, skipped: Counter[str]) -> Any:
    is_large: Any = pc.greater(pc.binary_length(texts), max_bytes)
    if is_large.true_count:
        skipped[TOO_LARGE] += is_large.true_count
        texts = texts.filter(pc.invert(is_large))
    return texts


def _without_blanks(texts: Any, skipped: Counter[str]) -> Any:
    if texts.null_count:
        skipped["null"] += texts.null_count
        texts = texts.drop_null()
    is_blank: Any = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0))  # trimming would copy them
    if is_blank.true_count:
        skipped["blank"] += is_blank.true_count
        texts = texts.filter(pc.invert(is_blank))
    return texts
