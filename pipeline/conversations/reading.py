"""Conversations of a work item: from parquet and JSON lines to lists of messages, with the place of each.

What is none, or none to learn from (messages.py), is counted by its reason and left out; the first of each is named.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.conversations.messages import checked
from pipeline.conversations.templates import Message
from pipeline.errors import UserError
from pipeline.sources import json_lines
from pipeline.sources.readers import json_records, parquet_rows, read_slices
from pipeline.sources.text_columns import LISTS
from pipeline.sources.work_items import NO_KEY, NOT_UTF8, Damage, FileSlice, LeftOut, RecordError, WorkItem


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of one record of a file."""

    messages: list[Message]
    place: str
    """Where it is, for messages: line 12, row 7."""
    file_slice: FileSlice

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of its messages' contents."""
        return sum(len(message["content"].encode("utf-8", "replace")) for message in self.messages)


def read_conversations(
    item: WorkItem, left_out: LeftOut, fetched: pa.Table | None = None, damaged: Damage | None = None
) -> Iterator[Conversation]:
    """The conversations of an item, in order; ``fetched`` and ``damaged`` are as of readers.read_item.

    Raises:
        DamagedInputError: a file that cannot be read, where ``damaged`` is not given.
        UserError: a file that is neither parquet nor JSON lines.
    """
    key = item.text_column.removesuffix(LISTS)

    def read(file_slice: FileSlice, file: Any, start: int | None) -> Iterator[Conversation]:
        for place, get_value in _values(file_slice, item, key, file, start):
            try:
                yield Conversation(messages=checked(get_value()), place=place, file_slice=file_slice)
            except RecordError as error:
                left_out.add_bad(error, place, file_slice)

    return read_slices(item, fetched, damaged, read)


def _values(
    file_slice: FileSlice, item: WorkItem, key: str, file: Any, start: int | None
) -> Iterator[tuple[str, functools.partial[Any]]]:
    """Place of each record, and what makes its value, or raises a RecordError."""
    if file_slice.kind == "parquet":
        for first_row, batch, _ in parquet_rows(file_slice, item, file):
            column = batch.column(batch.schema.get_field_index(key))
            for row in range(len(batch)):
                yield f"row {first_row + row}", functools.partial(_cell, column, row)
    elif file_slice.kind == "jsonl":
        for place, line in json_records(file_slice, file, start):
            yield place, functools.partial(_under, line, key)
    else:
        raise UserError(
            f"{file_slice.where} holds no conversations that can be read; give parquet files or JSON lines (.jsonl)"
        )


def _cell(column: pa.Array, row: int) -> Any:
    try:
        return column[row].as_py()
    except UnicodeDecodeError as error:
        raise RecordError("is not UTF-8 text", NOT_UTF8) from error


def _under(line: bytes | bytearray, key: str) -> Any:
    values = json_lines.object_of(line)
    if key not in values:
        raise RecordError(f"has no key {key!r}, only {', '.join(values)}; name one with --messages_key", NO_KEY)
    return values[key]
