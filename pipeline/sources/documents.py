"""Text files of many documents: the separator between them, their positions in a part of a file, and their number.

Occurrences of the separator that overlap are one boundary, so where a document begins depends on the file alone, not
on where reading began. A blank line is a separator too, with either end of line. Documents lose the line ends around
them; what holds nothing but white space is none. Memory holds the longest document, or what is read at a time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.sources.arrow_values import array_of
from pipeline.sources.work_items import ExpansionError

BLANK_LINE = "\n\n"
USUAL = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "</s>", "<eos>")
"""Separators that text files are often found to have."""

_CHUNK_BYTES = 1 << 20  # per read
_GIANT_BYTES = 16_000_000  # a longer document becomes an array where it lies in memory
_LINE_ENDS = b"\r\n"

Document: TypeAlias = bytes | pa.Array | None
"""UTF-8 text, not yet checked; None for a document that is longer than allowed."""


class Separator:
    """The text between documents, as bytes to look for."""

    def __init__(self, text: str) -> None:
        content = text.encode()
        self.reach = len(content) + (text == BLANK_LINE)
        """Bytes in front of a boundary's end that tell that it is one."""
        # An occurrence that begins in the one before adds its last bytes; the nearest is tried first.
        periods = [shift for shift in range(1, len(content)) if content[shift:] == content[:-shift]]
        more = b"|".join(re.escape(content[-shift:]) for shift in periods)
        expression = re.escape(content) + (b"(?:" + more + b")*" if periods else b"")
        self._pattern = re.compile(rb"\n(?:\r?\n)+" if text == BLANK_LINE else expression)

    def spans(self, content: bytes | bytearray, start: int) -> list[tuple[int, int]]:
        """[begin, end) of every boundary in ``content`` from ``start`` on."""
        return [match.span() for match in self._pattern.finditer(content, start)]


def seek_first_document(file: Any, start: int, stop: int, separator: Separator) -> int:
    """Seek the first document that begins at ``start`` or later; returns its position, or ``stop`` if there is none."""
    position = max(0, start - separator.reach)
    file.seek(position)
    if start == 0:
        return 0
    for _, end in _boundaries(file, position, separator):
        if end >= start:
            file.seek(min(end, stop))
            return min(end, stop)
    return stop


def _boundaries(file: Any, position: int, separator: Separator) -> Iterator[tuple[int, int]]:
    """[begin, end) in the file of every boundary from ``position`` on, where ``file`` is; keeps no text in memory."""
    rest = b""
    while chunk := file.read(_CHUNK_BYTES):
        content = rest + chunk
        keep = max(0, len(content) - separator.reach)  # from here on a boundary may begin that goes on
        for begin, end in separator.spans(content, 0):
            if end == len(content):
                keep = begin
                break
            yield position + begin, position + end
            keep = max(keep, end)
        position += keep
        rest = content[keep:]
    yield from ((position + begin, position + end) for begin, end in separator.spans(rest, 0))


def read_documents(
    file: Any, position: int, stop: int | None, separator: Separator, *, max_bytes: int | None = None, limit: int
) -> Iterator[tuple[int, Document]]:
    """(position, text) of every document that begins before ``stop``; ``file`` is at ``position``, where one begins.

    Of a document above ``max_bytes`` no more than that is kept. Raises ExpansionError for one above ``limit``.
    """
    content, begin, searched = bytearray(), 0, 0
    first, is_too_long = position, False  # of the document that begins at content[begin]
    while stop is None or first < stop:
        chunk = file.read(_CHUNK_BYTES)
        content += chunk
        spans = separator.spans(content, searched)
        searched = max(0, len(content) - separator.reach)
        if chunk and spans and spans[-1][1] == len(content):
            searched = spans.pop()[0]  # it may go on
        if not chunk:
            spans.append((len(content), len(content)))
        is_lent = False  # to an array, which keeps its size
        for end, after in spans:
            if stop is not None and first >= stop:
                return
            document = None if is_too_long else _document(content, begin, end, first)
            is_lent = is_lent or isinstance(document, pa.Array)
            if is_too_long or (document is not None and max_bytes and _num_bytes(document) > max_bytes):
                yield first, None
            elif document is not None:
                yield first, document
            begin, first, is_too_long = after, position + after, False
        if not chunk:
            return
        if len(content) - begin > limit:
            raise ExpansionError(f"has more than {limit / 1e6:,.0f} MB of text without a separator")
        if max_bytes and len(content) - begin > max_bytes + separator.reach:
            is_too_long, begin = True, len(content) - separator.reach
        if is_lent:
            content = content[begin:]
        elif begin:
            del content[:begin]
        position, searched, begin = position + begin, max(0, searched - begin), 0


def _document(content: bytearray, begin: int, end: int, position: int) -> bytes | pa.Array | None:
    """The text of content[begin:end] without the ends of lines around it; None where there is only white space."""
    if position == 0 and content.startswith(codecs.BOM_UTF8, begin, end):
        begin += len(codecs.BOM_UTF8)
    if end - begin <= _GIANT_BYTES:
        document = bytes(content[begin:end]).strip(_LINE_ENDS)
        return None if not document or document.isspace() else document
    while end > begin and content[end - 1] in _LINE_ENDS:
        end -= 1
    while end > begin and content[begin] in _LINE_ENDS:
        begin += 1
    return array_of(content, begin, end, pa.large_string())


def _num_bytes(document: bytes | pa.Array) -> int:
    return len(document) if isinstance(document, bytes) else len(document[0].as_buffer())


def count_documents(file: Any, limit: int, stop: int | None, separator: Separator) -> tuple[int, int]:
    """Count documents that begin before ``stop``, up to ``limit``; also returns where the one behind them begins."""
    records = 0
    for position, _ in read_documents(file, 0, stop, separator, limit=1 << 62):
        if records == limit:
            return records, position
        records += 1
    return records, 1 << 62
