"""JSON files in a folder, on a disk or in a bucket: one loader for the files that this project reads, by their schemas.

Others may have written them. pydantic parses and checks in one pass: types without conversions, names of files that
stay within their folder, no more than 200 levels of nesting. What a file may take of memory is bounded by its size: a
wrong entry of a list or a dictionary costs some 300 bytes until the first of them is reported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError

from pipeline.errors import UserError
from pipeline.storage.folders import Folder, is_file_name

T = TypeVar("T")

MOST_BYTES = 4 << 20
_MOST_CHARACTERS = 200  # of a reason


class WrongJsonError(ValueError):
    """Content that does not fit its schema; the message is a reason to be put into brackets."""


class DamagedFileError(UserError):
    """A JSON file that is not what its schema says; a file that can be made again may be left aside."""


def _named(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("it is no name of a file in a folder")
    return name


FileName = Annotated[str, AfterValidator(_named)]
"""The name of a file in the folder of the file that names it, or below."""


def parse_json(content: bytes, schema: type[T], *, most_bytes: int = MOST_BYTES) -> T:
    """``content`` as a value of ``schema``: a dataclass, a TypedDict, or what else pydantic knows.

    Further keys are left out.

    Raises:
        WrongJsonError: it is no JSON, too long, too deep, or not of the schema.
    """
    if len(content) > most_bytes:
        raise WrongJsonError(f"it has more than {most_bytes:,} bytes")
    try:
        value: T = _adapter(cast(Hashable, schema)).validate_json(content, strict=True)
        return value
    except ValidationError as error:
        raise WrongJsonError(_reason(error)) from None


def read_json(folder: Folder, name: str, schema: type[T], *, mend: str, most_bytes: int = MOST_BYTES) -> T | None:
    """The content of a JSON file, or None where it is absent.

    Args:
        mend: what to do about a damaged file, the end of a sentence.

    Raises:
        DamagedFileError: it is not of the schema.
        UserError: it cannot be read.
    """
    try:
        content = folder.read_range(name, 0, most_bytes + 1)
        return parse_json(content, schema, most_bytes=most_bytes)
    except FileNotFoundError:
        return None
    except WrongJsonError as error:
        raise DamagedFileError(f"{folder}/{name} is damaged ({error}); {mend}") from error


def write_json(folder: Folder, name: str, values: Any, *, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all."""
    folder.write(name, [json.dumps(values, indent=indent).encode()])


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    text = f"{place}: {first['msg']}" if place else first["msg"]
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
