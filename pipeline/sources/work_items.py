"""A file slice is a part of one file that can be read on its own; a work item is what one task reads: slices.

Both are plain values that can be sent to any machine. A file is opened here, and only if it is still what was planned;
whatever goes wrong with it becomes one sentence here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.selection import compression_of
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile

_HEAD_BYTES = 512
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/")
_POINTER_BYTES = range(100, 1024)  # the format asks for less than 1,024
_SIGNS = [  # first bytes, and the end of a sentence on what the file is
    (_POINTER, "a git-LFS pointer, not the file itself; run git lfs pull where it was cloned"),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE),
        "a web page (HTML), such as a login page, not the file itself; fetch it anew",
    ),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<Error>", re.IGNORECASE),
        "the error message of a bucket (XML), not the file itself; fetch it anew",
    ),
]
_SIGNS_OF_PLAIN_FILES = [
    (re.compile(rb"\x1f\x8b\x08"), "gzip data; add .gz to its name"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd data; add .zst to its name"),
    (re.compile(rb"BZh[1-9]"), "bzip2 data; add .bz2 to its name"),
    (re.compile(rb"\xfd7zXZ\0"), "xz data; add .xz to its name"),
    (re.compile(rb"PAR1"), "a parquet file; let its name end in .parquet"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it"),
]

Damage = list[dict[str, str]]
"""Everything that could not be read: {"name": the part of the file, "reason": a sentence}."""

NO_KEY, NOT_TEXT, NOT_JSON, NOT_UTF8 = "without the key", "not text", "not JSON", "not UTF-8"
TOO_LARGE = "above max_document_bytes"


class RecordError(ValueError):
    """One record, such as a line, holds no text that can be read; the message goes on after the record's place."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NoTextError(UserError):
    """A file has no text under the name of the text column; ``--skip_bad_files`` leaves it out."""


class ExpansionError(Exception):
    """A record of a compressed file is far larger than the file; the message goes on after the file's name."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The records that are left out: how many for each reason, and, where bad ones are, where the first is."""

    counts: Counter[str]
    first: dict[str, str] | None
    """Reason -> a sentence about the first bad record of a file; None: a bad record is an error."""

    def add_bad(self, error: RecordError, place: str, file_slice: FileSlice) -> None:
        """Count a record of a file, or raise an error that names it."""
        if self.first is None:
            kind = UserError if error.reason in {NO_KEY, NOT_TEXT} else DamagedInputError
            raise kind(f"{place} of {file_slice.where} {error}") from error
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, f"{place} of {file_slice.name} {error}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRules:
    """What makes documents of the records of a file, besides the text column."""

    column_separator: str = "\n\n"
    """Text between the columns that make a document, where there are several."""
    document_separator: str | None = None
    """Text between the documents of a text file; None: a file is one document."""
    max_document_bytes: int | None = None
    """Largest document in bytes of UTF-8; None: any."""

    def changes(self) -> dict[str, Any]:
        """The values that are not the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(AS_THEY_ARE, name)}


AS_THEY_ARE = DocumentRules()


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSlice:
    """A part of one file that can be read on its own."""

    name: str
    path: str
    """Path on this machine; empty for a remote file."""
    kind: str
    """parquet, arrow, csv, tsv, jsonl, txt, documents (a text file of many) or py."""
    version: str
    """Hash or ETag of a remote file, or size and time of change of a local one, which pins the content."""
    start: int = 0
    stop: int = 1
    """Row groups [start, stop) of parquet, lines or documents that begin in bytes [start, stop) of a plain file."""
    size_bytes: int
    """Approximate bytes of text in it."""
    max_documents: int | None = None
    """Largest number of records to read: rows, lines that are not blank, files. None: all."""
    file: RemoteFile | None = None

    @property
    def is_range(self) -> bool:
        """Whether start and stop are bytes."""
        return self.kind in ("jsonl", "documents") and compression_of(self.name) is None

    @property
    def label(self) -> str:
        """Its name for records and messages, the same on every machine."""
        if self.kind == "parquet":
            return f"{self.name} row groups {self.start}-{self.stop}"
        return f"{self.name} bytes {self.start}-{self.stop}" if self.is_range else self.name

    @property
    def where(self) -> str:
        """Name of the file in messages."""
        return self.file.where if self.file else self.path


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """The slices that one tokenization task reads: parts of one file, or whole small files."""

    index: int
    slices: tuple[FileSlice, ...]
    text_column: str
    rules: DocumentRules = AS_THEY_ARE

    @property
    def size_bytes(self) -> int:
        """Approximate bytes of text in it."""
        return sum(file_slice.size_bytes for file_slice in self.slices)

    @property
    def label(self) -> str:
        """Its name for records and messages, the same on every machine."""
        first, last = self.slices[0], self.slices[-1]
        return first.label if first is last else f"{first.label} to {last.label}"

    @property
    def key(self) -> str:
        """Hash of everything that is read, without paths of this machine."""
        parts = [
            (file_slice.name, file_slice.start, file_slice.stop, file_slice.version, file_slice.max_documents)
            for file_slice in self.slices
        ]
        rules = [changes] if (changes := self.rules.changes()) else []
        return hashlib.sha256(json.dumps([self.index, self.text_column, parts, *rules]).encode()).hexdigest()


def stored_bytes(file_slice: FileSlice) -> int:
    """Size of the whole file as it is stored, compressed or not."""
    return file_slice.file.size_bytes if file_slice.file else Path(file_slice.path).stat().st_size


def local_version(stat: os.stat_result) -> str:
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def open_slice(file_slice: FileSlice) -> BinaryIO:
    """Open the file of a slice, to be read from any position; DamagedInputError where it is not what was planned."""
    if file_slice.file is not None:
        return remote_files.open_file(file_slice.file)
    path = Path(file_slice.path)
    if file_slice.kind != "py" and local_version(path.stat()) != file_slice.version:
        raise DamagedInputError(  # not for modules, which every machine of a cluster installs at another time
            f"{file_slice.where} has changed since the plan was made; plan it anew, into another output folder"
        )
    return path.open("rb")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever Arrow or the system raises about the file ``where`` into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedInputError(f"{where} is missing; was it moved while the job ran?") from error
    except PermissionError as error:
        raise UserError(f"{where} may not be read by this user; change its permissions") from error
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DamagedInputError(f"{where} cannot be read, it may be damaged or truncated: {reason}") from error


# ---- files that are something else -----------------------------------------------------------------------------------


def require_no_pointer(whole: FileSlice) -> None:
    """Raise DamagedInputError for a git-LFS pointer; the hub has none, and large files are not looked at."""
    is_on_hub = whole.file is not None and whole.file.url.startswith("hf://")
    if whole.kind == "py" or is_on_hub or whole.size_bytes not in _POINTER_BYTES:
        return
    with reading(whole.where), open_slice(whole) as file:
        head = bytes(file.read(_HEAD_BYTES))
    if _POINTER.match(head):
        raise DamagedInputError(f"{whole.where} is {_SIGNS[0][1]}")


def explained(file_slice: FileSlice, error: UserError) -> UserError:
    """The error of a file that cannot be read, or one that says what the file is, where its first bytes tell."""
    if file_slice.file is not None and not isinstance(error, DamagedInputError):
        return error  # of a server, perhaps, which is not asked again
    head = b""
    with contextlib.suppress(UserError, OSError), open_slice(file_slice) as file:
        head = bytes(file.read(_HEAD_BYTES))
    is_plain = file_slice.kind not in ("parquet", "arrow") and compression_of(file_slice.name) is None
    for sign, what in _SIGNS:
        if sign.match(head):
            return DamagedInputError(f"{file_slice.where} is {what}")
    for sign, what in _SIGNS_OF_PLAIN_FILES if is_plain else []:
        if sign.match(head):
            data, _, advice = what.partition("; ")
            if file_slice.file is not None:  # nobody can rename a file behind an address
                advice = f"download it, {advice}, and name the local file as source"
            return DamagedInputError(f"{file_slice.where} is {data}; {advice}")
    return error
