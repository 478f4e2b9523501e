"""A file slice is a part of one file that can be read on its own; a work item is what one task reads: slices.

Both are plain values that can be sent to any machine. A file is opened here, and only if it is still what was planned;
whatever goes wrong with it becomes one sentence here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile

COMPRESSIONS = (".gz", ".zst")

Damage = list[dict[str, str]]
"""Everything that could not be read: {"name": the part of the file, "reason": a sentence}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSlice:
    """A part of one file that can be read on its own."""

    name: str
    path: str
    """Path on this machine; empty for a remote file."""
    kind: str
    """parquet, jsonl, txt or py."""
    version: str
    """Hash or ETag of a remote file, or size and time of change of a local one, which pins the content."""
    start: int = 0
    stop: int = 1
    """Row groups [start, stop) of parquet, lines that begin in bytes [start, stop) of plain JSON lines."""
    size_bytes: int
    """Approximate bytes of text in it."""
    max_documents: int | None = None
    """Largest number of records to read: rows, lines that are not blank, files. None: all."""
    file: RemoteFile | None = None

    @property
    def is_range(self) -> bool:
        """Whether start and stop are bytes."""
        return self.kind == "jsonl" and not self.name.endswith(COMPRESSIONS)

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
        return hashlib.sha256(json.dumps([self.index, self.text_column, parts]).encode()).hexdigest()


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


def unpacked(file: Any, name: str) -> Any:
    """The byte stream of a file, decompressed if its name ends in .gz or .zst; OSError where it is truncated."""
    if name.endswith(".gz"):
        return pa.input_stream(file, compression="gzip")
    return pa.input_stream(file, compression="zstd") if name.endswith(".zst") else file


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
