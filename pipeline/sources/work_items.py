"""A piece is a part of one file that can be read on its own; a work item is what one task reads, one piece or more.

Both are plain values that any machine can be told. A file is opened here, and only if it is still what was planned;
whatever goes wrong with it becomes one sentence here.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from pipeline.remote.files import RemoteFile

COMPRESSIONS = (".gz", ".zst")

Damage = list[dict[str, str]]
"""What could not be read: {"name": which part of which file, "reason": a sentence}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of one file that can be read on its own."""

    name: str
    path: str
    """On this machine; empty for a remote file."""
    kind: str
    """parquet, jsonl, txt or py."""
    version: str
    """What pins its content, here: hash or ETag of a remote file, or size and time of change of a local one."""
    start: int = 0
    stop: int = 1
    """Row groups [start, stop) of parquet, lines that begin in bytes [start, stop) of plain JSON lines."""
    size_bytes: int
    """Text in it, about."""
    max_documents: int | None = None
    """Records read at most: rows, lines that are not blank, files. Not given: all."""
    file: RemoteFile | None = None

    @property
    def is_range(self) -> bool:
        """Whether start and stop are bytes."""
        return self.kind == "jsonl" and not self.name.endswith(COMPRESSIONS)

    @property
    def label(self) -> str:
        """The same words on every machine."""
        if self.kind == "parquet":
            return f"{self.name} row groups {self.start}-{self.stop}"
        return f"{self.name} bytes {self.start}-{self.stop}" if self.is_range else self.name

    @property
    def where(self) -> str:
        """How messages name the file."""
        return self.file.where if self.file else self.path


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """What one tokenization task reads, a part of one file or whole small files; plain values all through."""

    index: int
    pieces: tuple[Piece, ...]
    text_column: str

    @property
    def size_bytes(self) -> int:
        """Text in it, about."""
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def label(self) -> str:
        """The same words on every machine."""
        first, last = self.pieces[0], self.pieces[-1]
        return first.label if first is last else f"{first.label} to {last.label}"

    @property
    def key(self) -> str:
        """Hash of what is read, free of this machine's paths."""
        parts = [(piece.name, piece.start, piece.stop, piece.version, piece.max_documents) for piece in self.pieces]
        return hashlib.sha256(json.dumps([self.index, self.text_column, parts]).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkItem:
        values = json.loads(text)
        pieces = []
        for piece in values.pop("pieces"):
            file = piece.pop("file")
            pieces.append(Piece(**piece, file=RemoteFile(**file) if file else None))
        return cls(**values, pieces=tuple(pieces))


def local_version(stat: os.stat_result) -> str:
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def open_piece(piece: Piece) -> BinaryIO:
    """The file of a piece, for reading at any place; raises DamagedInputError where it is not what was planned."""
    if piece.file is not None:
        return remote_files.open_file(piece.file)
    path = Path(piece.path)
    if piece.kind != "py" and local_version(path.stat()) != piece.version:
        raise DamagedInputError(  # modules are let pass: every machine of a cluster installs its own, at its own time
            f"{piece.where} has changed since the plan was made; plan it anew, into another output folder"
        )
    return path.open("rb")


def unpacked(file: Any, name: str) -> Any:
    """The byte stream of a file, decompressed where its name ends in .gz or .zst; a truncated one raises OSError."""
    if name.endswith(".gz"):
        return pa.input_stream(file, compression="gzip")
    return pa.input_stream(file, compression="zstd") if name.endswith(".zst") else file


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever Arrow or the system raises about the file ``where``, as one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedInputError(f"{where} is missing; was it moved while the job ran?") from error
    except PermissionError as error:
        raise UserError(f"{where} may not be read by this user; change its permissions") from error
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DamagedInputError(f"{where} cannot be read, it may be damaged or truncated: {reason}") from error
