"""What to read: a source becomes pieces of files, pieces are packed into work items (readers.py reads them).

A source is a local file, folder or glob, a data set of the Hugging Face hub, or the docstrings of the Python packages
installed here. The plan is a function of the input and of ``item_bytes`` alone, with no path of this machine in its
names, so every machine plans the same items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import docstrings, hub
from pipeline.errors import UserError

INSTALLED_DOCS = "installed-docs"
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSIONS = (".gz", ".zst")
_RANGE_BYTES = 4_000_000  # plain .jsonl files are divided this finely
_COMPRESSED_TO_TEXT = 3  # text per byte of .gz or .zst, roughly; plans only


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that a source reads, as the manifest names it."""

    name: str
    """Relative to the source."""
    version: str = ""
    """What pins its content: commit and blob of a hub file, version of a package; empty for local files."""
    size_bytes: int | None = None
    mtime_ns: int | None = None
    """Of a local file: tells on this machine that it changed; stays out of the manifest."""

    def describe(self) -> dict[str, Any]:
        """What is the same on every machine."""
        return {"name": self.name, "version": self.version, "size_bytes": self.size_bytes}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one file that can be read on its own."""

    name: str
    path: str
    """On this machine, or inside the hub repository."""
    kind: str
    """parquet, jsonl, txt or py."""
    version: str
    """What pins its content, here: the hub's hash, or size and time of change of a local file."""
    start: int = 0
    stop: int = 1
    """Row groups [start, stop) of parquet, lines that begin in bytes [start, stop) of plain JSON lines."""
    size_bytes: int
    """Text in it, about."""
    repository: hub.Repository | None = None

    @property
    def label(self) -> str:
        """The same words on every machine."""
        if self.kind == "parquet":
            return f"{self.name} row groups {self.start}-{self.stop}"
        is_range = self.kind == "jsonl" and not self.name.endswith(COMPRESSIONS)
        return f"{self.name} bytes {self.start}-{self.stop}" if is_range else self.name

    @property
    def where(self) -> str:
        """How messages name the file."""
        return f"hf://datasets/{self.repository.name}/{self.path}" if self.repository else self.path


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """What one tokenization task reads; plain values all through."""

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
        parts = [(piece.name, piece.start, piece.stop, piece.version) for piece in self.pieces]
        return hashlib.sha256(json.dumps([self.index, self.text_column, parts]).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkItem:
        values = json.loads(text)
        pieces = []
        for piece in values.pop("pieces"):
            repository = piece.pop("repository")
            pieces.append(Piece(**piece, repository=hub.Repository(**repository) if repository else None))
        return cls(**values, pieces=tuple(pieces))


class Source(Protocol):
    """Where texts come from."""

    @property
    def pinned(self) -> str | None:
        """The source with what may move fixed, or None where nothing fixes it."""

    def inputs(self) -> list[Input]:
        """What is read, in order; cheap, opens no file."""

    def pieces(self, text_column: str) -> list[Piece]:
        """The finest parts that can be read on their own, in order."""


def find(source: str) -> Source:
    """The source that ``source`` names; raises UserError where there is nothing of that name."""
    if source == INSTALLED_DOCS:
        return InstalledDocs()
    if source.startswith("hf://"):
        return HubDataset.find(source)
    if "://" in source:
        raise UserError(f"source {source}: only local paths, hf://datasets/... and {INSTALLED_DOCS} can be read")
    return LocalFiles.find(source)


def plan(source: Source, *, text_column: str, item_bytes: int) -> list[WorkItem]:
    """The work items of a source, in order; raises UserError where it holds no text at all."""
    pieces = source.pieces(text_column)
    if not sum(piece.size_bytes for piece in pieces):
        raise UserError(f"source {source} holds no text")
    return pack(pieces, text_column=text_column, item_bytes=item_bytes)


def pack(pieces: Iterable[Piece], *, text_column: str, item_bytes: int) -> list[WorkItem]:
    """Neighbouring pieces together, as many as fit ``item_bytes``; a larger piece is an item of its own."""
    groups: list[list[Piece]] = []
    free_bytes = 0
    for piece in pieces:
        if not groups or piece.size_bytes > free_bytes:
            groups.append([])
            free_bytes = item_bytes
        free_bytes -= piece.size_bytes
        group = groups[-1]
        if group and group[-1].path == piece.path and group[-1].stop == piece.start:
            size_bytes = group[-1].size_bytes + piece.size_bytes
            group[-1] = dataclasses.replace(group[-1], stop=piece.stop, size_bytes=size_bytes)
        else:
            group.append(piece)
    return [WorkItem(index=index, pieces=tuple(group), text_column=text_column) for index, group in enumerate(groups)]


def spread(pieces: list[Piece], sample_bytes: int) -> list[Piece]:
    """Pieces at even distances over the whole source, ``sample_bytes`` together at most, but at least one."""
    total_bytes = sum(piece.size_bytes for piece in pieces)
    if total_bytes <= sample_bytes:
        return pieces
    chosen: list[Piece] = []
    seen_bytes = chosen_bytes = 0
    for piece in pieces:
        seen_bytes += piece.size_bytes
        if (chosen_bytes + piece.size_bytes) * total_bytes <= seen_bytes * sample_bytes:
            chosen.append(piece)
            chosen_bytes += piece.size_bytes
    return chosen or [min(pieces, key=lambda piece: piece.size_bytes)]


# ---- sources -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFiles:
    """A file, the files of a folder and its subfolders, or those that match a glob."""

    source: str
    paths: tuple[tuple[str, Path], ...]
    """Name relative to the source, and path; sorted by name."""

    def __str__(self) -> str:
        return self.source

    @property
    def pinned(self) -> None:
        return None

    @classmethod
    def find(cls, source: str) -> LocalFiles:
        path = Path(source).expanduser()
        if path.is_file():
            if kind_of(path.name) is None:
                raise UserError(f"source {source} is no {_known_suffixes()} file")
            return cls(source, ((path.name, path.absolute()),))
        if path.is_dir():
            base, matches = path, path.rglob("*")
            problem = f"source folder {source} holds no {_known_suffixes()} file"
        elif glob.has_magic(source):
            base = _fixed_part(path)
            matches = base.glob(path.relative_to(base).as_posix())
            problem = f"no {_known_suffixes()} file matches the source {source}"
        else:
            raise UserError(f"source {source} does not exist (looked for {path.absolute()})")
        named = sorted((match.relative_to(base).as_posix(), match.absolute()) for match in matches)
        files = [(name, file) for name, file in named if kind_of(name) and not _is_hidden(name) and file.is_file()]
        if not files:
            raise UserError(problem)
        return cls(source, tuple(files))

    def inputs(self) -> list[Input]:
        stats = [(name, path.stat()) for name, path in self.paths]
        return [Input(name=name, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns) for name, stat in stats]

    def pieces(self, text_column: str) -> list[Piece]:
        pieces: list[Piece] = []
        for name, path in self.paths:
            stat = path.stat()
            whole = Piece(
                name=name,
                path=str(path),
                kind=kind_of(name) or "",
                version=_local_version(stat),
                size_bytes=stat.st_size,
            )
            if whole.kind == "parquet":
                with reading(str(path)):
                    metadata = pq.read_metadata(path)
                pieces += _row_groups(metadata, whole, text_column)
            else:
                pieces += _ranges(whole)
        return pieces


@dataclass(frozen=True)
class HubDataset:
    """Files of a data set on the Hugging Face hub, at one commit."""

    source: str
    repository: hub.Repository
    files: tuple[hub.HubFile, ...]

    def __str__(self) -> str:
        return self.source

    @property
    def pinned(self) -> str:
        return hub.pin(self.source, self.repository.commit)

    @classmethod
    def find(cls, source: str) -> HubDataset:
        repository, files = hub.list_files(source)
        files = [file for file in files if kind_of(file.path) is not None]
        if not files:
            raise UserError(f"no {_known_suffixes()} file of the hub matches the source {source}")
        return cls(source, repository, tuple(files))

    def inputs(self) -> list[Input]:
        origin = f"{self.repository.name}@{self.repository.commit}"
        return [
            Input(name=file.path, version=f"{origin} {file.blob}", size_bytes=file.size_bytes) for file in self.files
        ]

    def pieces(self, text_column: str) -> list[Piece]:
        parquet_paths = [file.path for file in self.files if kind_of(file.path) == "parquet"]
        footers = dict(zip(parquet_paths, hub.read_footers(self.repository, parquet_paths), strict=True))
        pieces: list[Piece] = []
        for file in self.files:
            whole = Piece(
                name=file.path,
                path=file.path,
                kind=kind_of(file.path) or "",
                version=file.blob,
                size_bytes=file.size_bytes,
                repository=self.repository,
            )
            footer = footers.get(file.path)
            pieces += _ranges(whole) if footer is None else _row_groups(footer, whole, text_column)
        return pieces


@dataclass(frozen=True)
class InstalledDocs:
    """The docstrings of the Python packages installed here (see docstrings.py)."""

    def __str__(self) -> str:
        return INSTALLED_DOCS

    @property
    def pinned(self) -> None:
        return None

    def inputs(self) -> list[Input]:
        return [Input(name=name, version=version) for name, version in docstrings.versions().items()]

    def pieces(self, text_column: str) -> list[Piece]:
        del text_column
        files = docstrings.find_files()
        return [
            Piece(name=name, path=str(path), kind="py", version=_local_version(stat), size_bytes=stat.st_size)
            for name, path, stat in files
        ]


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the name's end; None for what cannot be read."""
    stem = name
    for compression in COMPRESSIONS:
        stem = stem.removesuffix(compression)
    kind = SUFFIXES.get(Path(stem).suffix)
    return None if kind == "parquet" and stem != name else kind


def _row_groups(metadata: Any, whole: Piece, text_column: str) -> list[Piece]:
    """One piece per row group, after a look at the schema."""
    schema = metadata.schema.to_arrow_schema()
    if text_column not in schema.names:
        raise UserError(
            f"{whole.where} has no column {text_column!r}, only {', '.join(schema.names)}; name one with --text_column"
        )
    arrow_type = schema.field(text_column).type
    if not is_text(arrow_type):
        raise UserError(
            f"column {text_column!r} of {whole.where} holds {arrow_type}, not text; name another with --text_column"
        )
    pieces = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = (row_group.column(index) for index in range(row_group.num_columns))
        size_bytes = next(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
        pieces.append(dataclasses.replace(whole, start=group, stop=group + 1, size_bytes=size_bytes))
    return pieces


def _ranges(whole: Piece) -> list[Piece]:
    """Byte ranges of a plain .jsonl file; anything else is read whole."""
    size_bytes = whole.size_bytes
    if whole.name.endswith(COMPRESSIONS):
        return [dataclasses.replace(whole, size_bytes=size_bytes * _COMPRESSED_TO_TEXT)]
    if whole.kind != "jsonl":
        return [whole]
    starts = range(0, size_bytes, _RANGE_BYTES)
    stops = [*starts[1:], size_bytes]
    return [
        dataclasses.replace(whole, start=start, stop=stop, size_bytes=stop - start)
        for start, stop in zip(starts, stops, strict=True)
    ]


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type holds text, dictionary-encoded or not."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or arrow_type == pa.string_view()
    )


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever Arrow or the system raises about the file ``where``, as one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{where} is missing; was it moved while the job ran?") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{where} cannot be read, it may be damaged or truncated: {reason}") from error


def _local_version(stat: os.stat_result) -> str:
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first wildcard."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _known_suffixes() -> str:
    return ".parquet, .jsonl or .txt (the last two also .gz or .zst)"
