"""JSON lines: their positions in a part of a file, their number, and the text of one line.

A line of 1 GB takes 1.1 GB of memory: its text is unescaped in place, a chunk at a time. This is written by hand, since
``json.loads`` took 2.9 times the size of a line of 220 MB of ASCII, and 9.5 times with one emoji in it, because Python
then stores four bytes per character.
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.sources.arrow_values import array_of
from pipeline.sources.text_columns import text_in
from pipeline.sources.work_items import NO_KEY, NOT_JSON, NOT_TEXT, NOT_UTF8, ExpansionError, RecordError

_CHUNK_BYTES = 1 << 20  # per read
_GIANT_BYTES = 16_000_000  # a longer line is not parsed by json.loads as a whole
_LITERAL_BYTES = 1 << 16  # a longer string of a giant line is parsed on its own
_UNESCAPED_BYTES = 1 << 22  # per step; more than the 6 bytes of an escape

Line = bytes | bytearray


def seek_first_line(file: Any, start: int, stop: int) -> int:
    """Seek the first line that begins at ``start`` or later; returns its position, or ``stop`` if there is none before.

    A line that began earlier is skipped without being kept in memory.
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


def read_lines(file: Any, position: int, stop: int | None, limit: int = 1 << 62) -> Iterator[tuple[int, Line]]:
    """(position, line without its end) of every line that begins before ``stop``; ``file`` is at ``position``.

    A line that spans chunks is a bytearray of its own, which the caller may change. Raises ExpansionError for one that
    is longer than ``limit``.
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
        if len(rest) > limit:
            raise ExpansionError(f"has a line of more than {limit / 1e6:,.0f} MB")
    if rest and (stop is None or position < stop):
        yield position, _without_mark(rest) if position == 0 else rest


def is_blank(line: Line) -> bool:
    return not line or line.isspace()


def count_records(file: Any, limit: int, stop: int | None = None) -> tuple[int, int]:
    """Count lines that are not blank and begin before ``stop``, up to ``limit``; also returns the end of the last one.

    Reading stops there. Takes the memory of a chunk, however long the lines are.
    """
    records = start = end = 0  # start of the current line, end of the last record
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


def text_of(line: Line, key: str, separator: str = "\n\n") -> bytes | pa.Array | None:
    """The text under ``key``, UTF-8; that of a giant line as an array of one value in the memory of ``line``.

    ``key`` may lie in others, or be several, whose texts are joined by ``separator`` (text_columns.py). Half a
    surrogate pair, which UTF-8 cannot write, becomes U+FFFD, as in Tokenizer.encode. Raises RecordError where the line
    is no JSON object, no UTF-8, or has no text under ``key``.
    """
    if len(line) > _GIANT_BYTES:
        return _giant_text(bytearray(line) if isinstance(line, bytes) else line, key, separator)
    text = _value(object_of(line), key, separator)
    return None if text is None else _encode(text)


def object_of(line: Line) -> dict[str, Any]:
    """The JSON object of a line; RecordError where it is none, or no UTF-8."""
    try:
        return _parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(line, error.start) from error
    except json.JSONDecodeError as error:
        raise _not_json(str(error)) from error


def _without_mark(line: Line) -> Line:
    if isinstance(line, bytearray):
        if line.startswith(codecs.BOM_UTF8):
            del line[: len(codecs.BOM_UTF8)]
        return line
    return line.removeprefix(codecs.BOM_UTF8)


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _not_json(str(error)) from error
    except ValueError:  # a number of thousands of digits, which Python does not convert
        values = json.loads(text, parse_int=lambda digits: 0)
    if not isinstance(values, dict):
        raise RecordError(f"holds a JSON {type(values).__name__}; one object per line is expected", NOT_JSON)
    return values


def _value(values: dict[str, Any], key: str, separator: str) -> str | None:
    try:
        return text_in(values, key, separator)
    except KeyError as error:
        raise RecordError(error.args[0], NO_KEY) from error
    except TypeError as error:
        raise RecordError(error.args[0], NOT_TEXT) from error


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def _not_json(reason: str) -> RecordError:
    return RecordError(f"is no JSON object ({reason}); one object per line is expected", NOT_JSON)


def _not_utf8(line: Line, position: int) -> RecordError:
    return RecordError(f"is not UTF-8 text: byte {position} is {line[position]:#04x}", NOT_UTF8)


# ---- giant lines -----------------------------------------------------------------------------------------------------


def _giant_text(line: bytearray, key: str, separator: str) -> bytes | pa.Array | None:
    """As ``text_of``: json.loads parses the line without its long strings, which are unescaped in place."""
    mark = secrets.token_hex(16)  # replaces a long string, followed by its number; too random to occur in a line
    rest, literals = _take_out_literals(line, mark)
    try:
        text = _value(_parse(rest.decode("utf-8")), key, f"{mark},")
    except UnicodeDecodeError as error:
        raise RecordError("is not UTF-8 text", NOT_UTF8) from error
    except json.JSONDecodeError as error:  # without its position, which is that in the rest
        raise _not_json(error.msg) from error
    parts = [] if text is None else text.split(f"{mark},")
    ends = {int(part.removeprefix(mark)): 0 for part in parts if part.startswith(mark)}
    for number, (begin, stop) in enumerate(literals):
        if number in ends:
            ends[number] = _unescape_in_place(line, begin, stop)
        else:
            for _ in _unescaped(line, begin, stop):  # only checked: the line is damaged if one of its strings is
                pass
    if len(parts) == 1 and ends:
        ((number, end),) = ends.items()
        return array_of(line, literals[number][0], end, pa.large_string())
    contents = [
        bytes(line[literals[number][0] : ends[number]]) if (number := _number(part, mark)) >= 0 else _encode(part)
        for part in parts
    ]
    texts = contents if len(contents) == 1 else [content for content in contents if content.strip()]
    return None if text is None else _encode(separator).join(texts)


def _number(part: str, mark: str) -> int:
    """The number of the long string that ``part`` stands for, or -1."""
    return int(part.removeprefix(mark)) if part.startswith(mark) else -1


def _take_out_literals(line: bytearray, mark: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The line with its long strings replaced by ``mark`` and number, and the range of bytes of every long string."""
    parts: list[Line] = []
    literals: list[tuple[int, int]] = []
    begin = copied = 0  # begin: of the string that is open; 0 where none is
    position = -1
    while (position := line.find(b'"', position + 1)) >= 0:
        if not begin:
            begin = position + 1
        elif not _is_escaped(line, begin, position):
            if position - begin > _LITERAL_BYTES:
                parts += [line[copied:begin], f"{mark}{len(literals)}".encode()]
                literals.append((begin, position))
                copied = position
            begin = 0
    if begin:
        raise _not_json("a string without end")
    parts.append(line[copied:])
    return b"".join(parts), literals


def _is_escaped(line: bytearray, begin: int, position: int) -> bool:
    """Whether an odd number of backslashes is directly before ``position``, from ``begin`` on."""
    first = position
    while first > begin and line[first - 1] == ord("\\"):
        first -= 1
    return (position - first) % 2 == 1


def _unescape_in_place(line: bytearray, begin: int, end: int) -> int:
    """Write the text over its own literal, which is never shorter; returns the end of the text."""
    written = begin
    for text in _unescaped(line, begin, end):
        content = _encode(text)
        line[written : written + len(content)] = content
        written += len(content)
    return written


def _unescaped(line: bytearray, begin: int, end: int) -> Iterator[str]:
    """The text of the literal [begin, end) in parts; the bytes of a yielded part may be overwritten."""
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
            raise _not_json(error.msg) from error
        if high:  # becomes one character with the second half, if that follows
            halves = (high + text[0]).encode("utf-16", "surrogatepass")
            text = halves.decode("utf-16", "surrogatepass") + text[1:]
        high = text[-1] if cut < end and "\ud800" <= text[-1] <= "\udbff" else ""
        yield text.removesuffix(high)
        begin = cut


def _safe_cut(line: bytearray, begin: int, cut: int) -> int:
    """A position at or a little before ``cut`` that divides neither an escape nor a character."""
    backslash = line.rfind(b"\\", cut - 6, cut)  # an escape has six bytes at most
    if backslash >= 0:
        return backslash + _is_escaped(line, begin, backslash)
    while line[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
