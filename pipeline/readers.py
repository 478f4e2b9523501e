"""Reading a work item: parquet, JSON lines, text files and Python modules in, Arrow arrays of texts out.

A document is a parquet row, a line of JSON, a text file, a documented Python module. Nulls and blank texts are counted
and left out. Anything else that is no text is a UserError that names file and place: nothing is read half.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import docstrings, hub
from pipeline.errors import UserError
from pipeline.sources import COMPRESSIONS, Piece, WorkItem, reading

_BATCH_CHARS = 16_000_000  # held at a time while an item is read
_BATCH_ROWS = 4096  # of parquet, about 14 MB of web pages
_CHUNK_BYTES = 1 << 20


def read_item(item: WorkItem, skipped: Counter[str]) -> Iterator[pa.Array]:
    """The texts of an item, in order, as string or large_string arrays of some 16 MB without nulls or blank texts.

    What is left out is counted in ``skipped`` by reason.

    Raises:
        UserError: a file that is missing, damaged or not UTF-8, a line that is not JSON or has no text.
    """
    for is_parquet, group in itertools.groupby(item.pieces, key=lambda piece: piece.kind == "parquet"):
        arrays: Iterable[pa.Array]
        if is_parquet:
            arrays = itertools.chain.from_iterable(_parquet_arrays(piece, item.text_column) for piece in group)
        else:
            documents = (_documents(piece, item.text_column, skipped) for piece in group)
            arrays = _gather(itertools.chain.from_iterable(documents))
        for array in arrays:
            yield _without_blanks(array, skipped)


def _without_blanks(texts: Any, skipped: Counter[str]) -> Any:
    if texts.null_count:
        skipped["null"] += texts.null_count
        texts = texts.drop_null()
    is_blank: Any = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0))  # trimming would copy all
    if is_blank.true_count:
        skipped["blank"] += is_blank.true_count
        texts = texts.filter(pc.invert(is_blank))
    return texts


def _gather(documents: Iterable[str]) -> Iterator[pa.Array]:
    """Arrays of about ``_BATCH_CHARS``."""
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document)
        if num_chars >= _BATCH_CHARS:
            yield pa.array(batch, pa.large_string())
            batch, num_chars = [], 0
    if batch:
        yield pa.array(batch, pa.large_string())


def _local_path(piece: Piece) -> Path:
    return hub.download(piece.repository, piece.path) if piece.repository else Path(piece.path)


def _parquet_arrays(piece: Piece, text_column: str) -> Iterator[pa.Array]:
    path = _local_path(piece)
    with reading(piece.where), pq.ParquetFile(path) as file:
        groups = range(piece.start, piece.stop)
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        batches = file.iter_batches(_BATCH_ROWS, list(groups), [text_column], use_threads=False)
        for batch in batches:
            texts: Any = batch.column(0)
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                texts = texts.cast(pa.large_string())  # dictionaries and views
            _require_utf8(texts, piece, row)
            yield texts
            row += len(texts)


def _require_utf8(texts: pa.Array, piece: Piece, first_row: int) -> None:
    """Arrow reads any bytes as strings; only a full validation (4 GB/s) looks at them."""
    with contextlib.suppress(pa.ArrowInvalid):
        texts.validate(full=True)
        return
    for row, value in enumerate(texts.cast(pa.large_binary()).to_pylist(), first_row):
        _decode(value or b"", f"row {row} of {piece.where}")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from error


def _documents(piece: Piece, text_column: str, skipped: Counter[str]) -> Iterator[str]:
    """The texts of a piece that is no parquet; the null ones are counted here."""
    if piece.kind == "jsonl":
        yield from _json_texts(piece, text_column, skipped)
        return
    with reading(piece.where), _open(piece) as file:
        content = file.read()
    if piece.kind == "txt":
        yield _decode(content.removeprefix(codecs.BOM_UTF8), piece.where)
        return
    try:
        document = docstrings.module_document(piece.name, content)
    except ValueError:  # UnicodeDecodeError too
        skipped["module that cannot be parsed"] += 1
        return
    if document is None:
        skipped["module with little documentation"] += 1
    else:
        yield document


def _json_texts(piece: Piece, key: str, skipped: Counter[str]) -> Iterator[str]:
    for number, line in enumerate(_lines(piece)):
        if not line.strip():
            continue
        try:
            text = _json_text(line, key)
        except ValueError as error:
            raise UserError(f"line {_line_number(piece, number)} of {piece.where} {error}") from error
        if text is None:
            skipped["null"] += 1
        else:
            yield text


def _json_text(line: bytes, key: str) -> str | None:
    """The text under ``key``; raises ValueError with the rest of a sentence that begins with the line."""
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: byte {error.start} is {line[error.start]:#04x}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is no JSON object ({error}); one object per line is expected") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a JSON {type(values).__name__}; one object per line is expected")
    if key not in values:
        raise ValueError(f"has no key {key!r}, only {', '.join(values)}; name one with --text_column")
    text = values[key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has a {type(text).__name__} under {key!r}, not text; name another key with --text_column")
    if text and (b"\\ud" in line or b"\\uD" in line) and not _encodes(text):
        raise ValueError("is not UTF-8 text: it spells half a surrogate pair")
    return text


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines that begin inside the piece, in a plain file; all lines of a compressed one."""
    plain = not piece.name.endswith(COMPRESSIONS)
    with reading(piece.where), _open(piece) as file:
        position = piece.start if plain else 0
        stop = piece.stop if plain else None
        lines = _split_lines(file)
        if position:  # what is left of a line that begins before the piece belongs to the piece before
            file.seek(position - 1)
            position += len(next(lines, b"")) - 1
        for line in lines:
            if stop is not None and position >= stop:
                return
            yield line if position else line.removeprefix(codecs.BOM_UTF8)
            position += len(line)


def _split_lines(file: Any) -> Iterator[bytes]:
    """The lines of a stream with their ends."""
    rest: list[bytes] = []
    while chunk := file.read(_CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest) + b"\n"
            rest = [line]
    if last := b"".join(rest):
        yield last


def _line_number(piece: Piece, number: int) -> int:
    """Counted from 1 in the whole file, for line ``number`` of the piece."""
    if piece.start == 0:
        return number + 1
    with reading(piece.where), _open(piece) as file:
        before = file.read(piece.start - 1)
        return int(before.count(b"\n")) + number + 2


def _open(piece: Piece) -> Any:
    """A byte stream, unpacked where the name ends in .gz or .zst; a truncated one raises OSError at its end."""
    path = str(_local_path(piece))
    if piece.name.endswith(".gz"):
        return pa.input_stream(path, compression="gzip")
    return pa.input_stream(path, compression="zstd") if piece.name.endswith(".zst") else Path(path).open("rb")
