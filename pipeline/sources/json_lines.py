"""Lines of JSON: where they begin in a part of a file, how many there are, and the text of one.

A line of 1 GB takes 1.1 GB: its text is unescaped in place, a chunk at a time. With ``json.loads`` a line of 220 MB
took 2.9 times its size in ASCII, and 9.5 times with one emoji in it, because Python then keeps four bytes a character.
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

_CHUNK_BYTES = 1 << 20  # read at a time
_GIANT_BYTES = 16_000_000  # a longer line is not given to json.loads
_LITERAL_BYTES = 1 << 16  # a longer string of a giant line is taken out of it
_UNESCAPED_BYTES = 1 << 22  # at a time; more than an escape of 6 bytes

Line = bytes | bytearray


def seek_first_line(file: Any, start: int, stop: int) -> int:
    """Set ``file`` to the first line that begins at or behind ``start``; returns where, ``stop`` if it is not before.

    A line that began earlier is passed over without being held.
    """
    position = max(0, start - 1)  # the byte before start tells whether a line begins there
    file.seek(position)
    if start == 0:
        return 0
    while position < stop - 1:
        chunk = file.read(_CHUNK_BYTES)
        if not chunk:
            break
        end = chunk.find(b"\n")
        if end >= 0:
            position += end + 1
            file.seek(position)
            return min(position, stop)
        position += len(chunk)
    return stop


def read_lines(file: Any, position: int, stop: int | None) -> Iterator[tuple[int, Line]]:
    """(position, line without its end) of every line that begins before ``stop``; ``file`` stands at ``position``.

    A line that spans chunks is a bytearray of its own, which the caller may change.
    """
    rest = bytearray()
    while stop is None or position < stop:
        chunk = file.read(_CHUNK_BYTES)
        if not chunk:
            break
        *ended, last = chunk.split(b"\n")
        for part in ended:
            if stop is not None and position >= stop:
                return
            line: Line = part
            if rest:
                rest += part
                line, rest = rest, bytearray()
            next_position = position + len(line) + 1
            yield position, _without_mark(line) if position == 0 else line
            position = next_position
        rest += last
    if rest and (stop is None or position < stop):
        yield position, _without_mark(rest) if position == 0 else rest


def is_blank(line: Line) -> bool:
    return not line or line.isspace()


def count_records(file: Any, limit: int, stop: int | None = None) -> tuple[int, int]:
    """Lines that are not blank and begin before ``stop``, ``limit`` at most, and where the last one ends.

    Nothing behind it is read. Takes the memory of a chunk, however long the lines.
    """
    records = start = end = 0  # start of the line at hand, end of the last record
    position = 0
    has_content = False
    while chunk := file.read(_CHUNK_BYTES):
        *ended, last = chunk.split(b"\n")
        for part in ended:
            if records == limit or (stop is not None and start >= stop):
                return records, end
            position += len(part) + 1
            if has_content or not is_blank(part):
                records, end = records + 1, position
            has_content, start = False, position
        position += len(last)
        has_content = has_content or not is_blank(last)
    if has_content and records < limit and (stop is None or start < stop):
        records, end = records + 1, position
    return records, end


def text_of(line: Line, key: str) -> bytes | pa.Array | None:
    """The text under ``key``, UTF-8; that of a giant line as an array of one, which takes ``line`` over.

    Raises ValueError where the line is no JSON object or no UTF-8, LookupError where it has no text under ``key``: the
    rest of a sentence that begins with the line.
    """
    if len(line) > _GIANT_BYTES:
        return _giant_text(bytearray(line) if isinstance(line, bytes) else line, key)
    try:
        text = _value(_parse(line.decode("utf-8")), key)
    except UnicodeDecodeError as error:
        raise _not_utf8(line, error.start) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON object ({error}); one object per line is expected") from error
    return None if text is None else _encode(text)


def _without_mark(line: Line) -> Line:
    if isinstance(line, bytearray):
        if line.startswith(codecs.BOM_UTF8):
            del line[: len(codecs.BOM_UTF8)]
        return line
    return line.removeprefix(codecs.BOM_UTF8)


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"is no JSON object ({error}); one object per line is expected") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a JSON {type(values).__name__}; one object per line is expected")
    return values


def _value(values: dict[str, Any], key: str) -> str | None:
    if key not in values:
        raise LookupError(f"has no key {key!r}, only {', '.join(values)}; name one with --text_column")
    text = values[key]
    if text is not None and not isinstance(text, str):
        raise LookupError(f"has a {type(text).__name__} under {key!r}, not text; name another key with --text_column")
    return text


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("is not UTF-8 text: it spells half a surrogate pair") from error


def _not_utf8(line: Line, position: int) -> ValueError:
    return ValueError(f"is not UTF-8 text: byte {position} is {line[position]:#04x}")


# ---- giant lines -----------------------------------------------------------------------------------------------------


def _giant_text(line: bytearray, key: str) -> pa.Array | None:
    """As ``text_of``: what is left without the long strings goes to json.loads, the strings are unescaped in place."""
    mark = secrets.token_hex(16)  # stands for a long string, followed by its number; no line holds it
    rest, literals = _take_out_literals(line, mark)
    try:
        text = _value(_parse(rest.decode("utf-8")), key)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error
    except json.JSONDecodeError as error:  # its position is that in the rest
        raise ValueError(f"is no JSON object ({error.msg}); one object per line is expected") from error
    wanted = int(text.removeprefix(mark)) if text and text.startswith(mark) else None
    end = 0
    for number, (begin, stop) in enumerate(literals):
        if number == wanted:
            end = _unescape_in_place(line, begin, stop)
        else:
            for _ in _unescaped(line, begin, stop):  # only looked at: the line is damaged if one of them is
                pass
    if wanted is None:
        return None if text is None else _encode(text)
    offsets = np.array([literals[wanted][0], end])
    return pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(line)])


def _take_out_literals(line: bytearray, mark: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The line with its long strings replaced by ``mark`` and number, and between which bytes they stood."""
    parts: list[Line] = []
    literals: list[tuple[int, int]] = []
    copied = position = 0
    while (begin := line.find(b'"', position) + 1) > 0:
        end = _end_of_literal(line, begin)
        if end - begin > _LITERAL_BYTES:
            parts += [line[copied:begin], f"{mark}{len(literals)}".encode()]
            literals.append((begin, end))
            copied = end
        position = end + 1
    parts.append(line[copied:])
    return b"".join(parts), literals


def _end_of_literal(line: bytearray, begin: int) -> int:
    """Where the quotation mark stands that ends the string which begins at ``begin``."""
    position = begin
    while (end := line.find(b'"', position)) >= 0:
        if _count_backslashes(line, begin, end) % 2 == 0:
            return end
        position = end + 1
    raise ValueError("is no JSON object (a string without end); one object per line is expected")


def _count_backslashes(line: bytearray, begin: int, end: int) -> int:
    """How many stand directly before ``end``."""
    position = end
    while position > begin and line[position - 1] == ord("\\"):
        position -= 1
    return end - position


def _unescape_in_place(line: bytearray, begin: int, end: int) -> int:
    """Write the text over its own literal, which is never shorter; returns where the text ends."""
    written = begin
    for text in _unescaped(line, begin, end):
        content = _encode(text)
        line[written : written + len(content)] = content
        written += len(content)
    return written


def _unescaped(line: bytearray, begin: int, end: int) -> Iterator[str]:
    """The text of the literal [begin, end) in parts; what has been given out may be written over."""
    high = ""  # first half of a surrogate pair, kept for the next part
    while begin < end:
        cut = min(begin + _UNESCAPED_BYTES, end)
        if cut < end:
            cut = _safe_cut(line, begin, cut)
        try:
            text = json.loads(f'"{line[begin:cut].decode("utf-8")}"')
        except UnicodeDecodeError as error:
            raise _not_utf8(line, begin + error.start) from error
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON object ({error.msg}); one object per line is expected") from error
        if high and "\udc00" <= text[0] <= "\udfff":
            pair = chr(0x10000 + ((ord(high) & 0x3FF) << 10) + (ord(text[0]) & 0x3FF))
            text, high = pair + text[1:], ""
        text = high + text
        high = text[-1] if cut < end and "\ud800" <= text[-1] <= "\udbff" else ""
        yield text.removesuffix(high)
        begin = cut


def _safe_cut(line: bytearray, begin: int, cut: int) -> int:
    """A place at or a little before ``cut`` that divides neither an escape nor a character."""
    backslash = line.rfind(b"\\", cut - 6, cut)  # an escape has six bytes at most
    if backslash >= 0:
        is_second = _count_backslashes(line, begin, backslash + 1) % 2 == 0
        return backslash + 1 if is_second else backslash
    while line[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
