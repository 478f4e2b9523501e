"""Which column or key holds the text: one name, one inside another (``data.text``), or several (``title,text``).

A column of exactly the given name comes first, whatever signs are in the name. Texts of several columns are joined; one
that is null or blank is left out of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of text in a table, which may lie inside others."""

    path: tuple[str, ...]
    """Its name, behind those of the columns that it lies in."""
    leaf: int
    """Its number among the columns that hold values themselves, which is its number in a parquet file."""
    type: pa.DataType

    @property
    def name(self) -> str:
        return ".".join(self.path)


def names_in(text_column: str) -> list[str]:
    """The names that a text column of several names stands for."""
    return [name.strip() for name in text_column.split(",") if name.strip()]


# ---- tables ----------------------------------------------------------------------------------------------------------


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type holds text, dictionary-encoded or not."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or arrow_type == pa.string_view()
    )


LISTS = "[]"
"""Behind the name of a text column: it holds a list, such as the messages of a conversation, which is read whole."""


def find_columns(schema: pa.Schema, text_column: str) -> list[Column]:
    """The columns of a table that hold the text, or nothing but nulls; of a list, all columns in it.

    Raises LookupError, with the rest of a sentence that begins with the file, where there is none of such a name, or
    more than one, or one that holds no text.
    """
    if text_column.endswith(LISTS):
        return _columns_of_list(schema, text_column.removesuffix(LISTS))
    columns = [Column(path=path, leaf=leaf, type=arrow_type) for leaf, path, arrow_type in _leaves(list(schema))]
    names = [text_column] if text_column in schema.names else names_in(text_column) or [text_column]
    found = [_the_column(columns, name, schema) for name in names]
    for column in found:
        if not is_text(column.type) and not pa.types.is_null(column.type):  # all null: what pandas writes of them
            raise LookupError(
                f"holds {column.type}, not text, in its column {column.name!r}; name another with --text_column"
            )
    return found


def find_names(names: Sequence[str], text_column: str) -> list[int]:
    """Numbers of the columns that hold the text, among columns that all do; raises LookupError as ``find_columns``."""
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    return [column.leaf for column in find_columns(schema, text_column)]


def _the_column(columns: Sequence[Column], name: str, schema: pa.Schema) -> Column:
    if (times := schema.names.count(name)) > 1:
        raise LookupError(
            f"has {times} columns named {name!r}, and it is not known which of them holds the text; write the file "
            "again with one of them, or name another column with --text_column"
        )
    found = [column for column in columns if column.path == (name,)]
    found = found or [column for column in columns if column.name == name and name not in schema.names]
    if found:
        return found[0]
    if name in schema.names:
        raise LookupError(
            f"holds {schema.field(name).type}, not text, in its column {name!r}; name what is in it with --text_column"
        )
    raise LookupError(f"has no column {name!r}, only {', '.join(schema.names)}; name one with --text_column")


def _columns_of_list(schema: pa.Schema, name: str) -> list[Column]:
    if name not in schema.names:
        raise LookupError(f"has no column {name!r}, only {', '.join(schema.names)}; name one with --messages_key")
    index = schema.get_field_index(name)  # -1 where several have the name
    if index < 0 or not (
        pa.types.is_list(schema.field(index).type) or pa.types.is_large_list(schema.field(index).type)
    ):
        raise LookupError(f"holds no lists of messages in its column {name!r}; name another with --messages_key")
    first = sum(num_leaves(field.type) for field in list(schema)[:index])
    arrow_type = schema.field(index).type
    return [Column(path=(name,), leaf=first + leaf, type=arrow_type) for leaf in range(num_leaves(arrow_type))]


def _leaves(fields: Sequence[pa.Field], first: int = 0) -> Iterator[tuple[int, tuple[str, ...], pa.DataType]]:
    """(number, path, type) of every column that can be named; lists and maps count, but nothing in them has a name."""
    for field in fields:
        if pa.types.is_struct(field.type):
            for leaf, path, arrow_type in _leaves([field.type.field(i) for i in range(field.type.num_fields)], first):
                yield leaf, (field.name, *path), arrow_type
        else:
            yield first, (field.name,), field.type
        first += num_leaves(field.type)


def num_leaves(arrow_type: pa.DataType) -> int:
    """Number of columns of a parquet file that a column of this type takes."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return num_leaves(arrow_type.storage_type)
    if pa.types.is_dictionary(arrow_type):
        return 1
    inner = [arrow_type.field(number) for number in range(arrow_type.num_fields)]
    return sum(num_leaves(field.type) for field in inner) if inner else 1


def joined_texts(batch: pa.RecordBatch, columns: Sequence[Column], separator: str) -> Any:
    """The texts of a batch's rows, large_string; null where all columns are null."""
    texts = [_values(batch, column).cast(pa.large_string()) for column in columns]
    if len(texts) == 1:
        return texts[0]
    nothing, empty = pa.scalar(None, pa.large_string()), pa.scalar("", pa.large_string())
    parts = [pc.if_else(_is_blank(text), nothing, text) for text in texts]
    parts[0] = pc.if_else(_all_null(parts), empty, parts[0])  # of a row without any part Arrow 25 would make no row
    joined = pc.binary_join_element_wise(*parts, pa.scalar(separator, pa.large_string()), null_handling="skip")
    return pc.if_else(_all_null(texts), nothing, joined)


def _all_null(texts: Sequence[Any]) -> Any:
    return functools.reduce(pc.and_, map(pc.is_null, texts))


def _values(batch: pa.RecordBatch, column: Column) -> Any:
    values: Any = batch.column(batch.schema.get_field_index(column.path[0]))
    for name in column.path[1:]:
        values = pc.struct_field(values, values.type.get_field_index(name))
    return values


def _is_blank(texts: Any) -> Any:
    return pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0))


# ---- lines of JSON ---------------------------------------------------------------------------------------------------


def text_in(values: Mapping[str, Any], text_column: str, separator: str) -> str | None:
    """The text of a JSON object; None where it is null.

    Raises KeyError, with the rest of a sentence that begins with the line, where it has no such key, TypeError where
    what is under it is no text.
    """
    if isinstance(text := values.get(text_column), str):
        return text
    if text_column in values or not {",", "."} & {*text_column}:
        return _text(values, text_column)
    names = names_in(text_column)
    if len(names) == 1:
        return _text(values, names[0])
    found: list[str | None] = []
    missing: list[KeyError] = []
    for name in names:
        try:
            found.append(_text(values, name))
        except KeyError as error:
            missing.append(error)
    if not found:
        raise missing[0]
    texts = [text for text in found if text is not None]
    return separator.join(text for text in texts if text and not text.isspace()) if texts else None


def _text(values: Mapping[str, Any], name: str) -> str | None:
    text = _look_up(values, name)
    if text is _ABSENT:
        raise KeyError(f"has no key {name!r}, only {', '.join(values)}; name one with --text_column")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"has a {type(text).__name__} under {name!r}, not text; name another key with --text_column")
    return text


_ABSENT = object()


def _look_up(values: Any, name: str) -> Any:
    """What lies under a key, or under ``a.b`` in the object under ``a``; null where that is null, else _ABSENT."""
    if not isinstance(values, dict):
        return _ABSENT
    if name in values:
        return values[name]
    for number, sign in enumerate(name):
        if sign == "." and name[:number] in values:
            inner = values[name[:number]]
            found = None if inner is None else _look_up(inner, name[number + 1 :])
            if found is not _ABSENT:
                return found
    return _ABSENT
