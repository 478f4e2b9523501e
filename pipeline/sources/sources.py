"""What to read: a source is a list of files; the layout of each says where it can be divided (plan.py divides it).

A source is a local file, folder or glob, the same on the Hugging Face hub or in a bucket, one file of a web server, or
the docstrings of the Python packages installed here. Listings and parquet footers are all that is read here. Names are
relative to the source, with no path of this machine in them, so every machine plans the same items.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError, UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote import files as remote_files
from pipeline.remote.files import RemoteFile
from pipeline.sources import docstrings
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.work_items import COMPRESSIONS, Damage, Piece, local_version, open_piece, reading

INSTALLED_DOCS = "installed-docs"
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
_RANGE_BYTES = 4_000_000  # plain .jsonl files can be divided this finely
_COMPRESSED_TO_TEXT = 3  # text per byte of .gz or .zst, roughly; plans only
_LOCAL_READERS = 8  # footers wait for the disk, which may be a network's
_REMOTE_READERS = 32


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that a source reads, as the manifest names it."""

    name: str
    """Relative to the source."""
    version: str = ""
    """What pins its content: hash or ETag of a remote file, version of a package; empty for local files."""
    size_bytes: int | None = None
    mtime_ns: int | None = None
    """Of a local file: tells on this machine that it changed; stays out of the manifest."""

    def describe(self) -> dict[str, Any]:
        """What is the same on every machine."""
        return {"name": self.name, "version": self.version, "size_bytes": self.size_bytes}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One file and where it can be divided; n units, 24 bytes each."""

    whole: Piece
    bounds: npt.NDArray[np.int64]
    """(n + 1,) unit i is [bounds[i], bounds[i + 1]): one row group, a range of bytes, or the whole file."""
    sizes: npt.NDArray[np.int64]
    """(n,) bytes of text, about."""
    documents: npt.NDArray[np.int64] | None = None
    """(n,) records; None where only reading would tell."""

    @classmethod
    def undivided(cls, whole: Piece, *, documents: int | None = None) -> Layout:
        """A file that is read whole."""
        return cls(
            whole=whole,
            bounds=np.array([0, 1]),
            sizes=np.array([whole.size_bytes]),
            documents=None if documents is None else np.array([documents]),
        )


class Source(Protocol):
    """Where texts come from."""

    @property
    def pinned(self) -> str | None:
        """The source with what may move fixed, or None where nothing fixes it."""

    def inputs(self) -> list[Input]:
        """What is read, in order; cheap, opens no file."""

    def layouts(
        self, text_column: str, progress: Callable[[], None] | None = None, damaged: Damage | None = None
    ) -> Iterator[Layout]:
        """The files in the same order; footers are read in threads a little ahead of the caller, who may stop.

        ``progress`` is called once per file. A file whose footer cannot be read is left out and noted in ``damaged``;
        where that is not given, it is a DamagedInputError. No text in ``text_column`` is a UserError.
        """


def find(source: str) -> Source:
    """The source that ``source`` names; raises UserError where there is nothing of that name."""
    if source == INSTALLED_DOCS:
        return InstalledDocs()
    if remote_files.is_remote(source):
        return RemoteFiles.find(source)
    if "://" in source:
        raise UserError(
            f"source {source} is none that can be read: a local path, hf://datasets/..., s3://..., gs://..., "
            f"https://... or {INSTALLED_DOCS}"
        )
    return LocalFiles.find(source)


@dataclass(frozen=True)
class LocalFiles:
    """A file, the files of a folder and its subfolders, or those that match a glob."""

    source: str
    files: tuple[tuple[str, Path, os.stat_result], ...]
    """Name relative to the source, path, state when it was listed; sorted by name."""

    @property
    def pinned(self) -> None:
        return None

    @classmethod
    def find(cls, source: str) -> LocalFiles:
        path = Path(source).expanduser()
        if path.is_file():
            if kind_of(path.name) is None:
                raise UserError(f"source {source} is no {_known_suffixes()} file")
            return cls(source, ((path.name, path.absolute(), path.stat()),))
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
        return cls(source, tuple((name, file, file.stat()) for name, file in files))

    def inputs(self) -> list[Input]:
        return [
            Input(name=name, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns) for name, _path, stat in self.files
        ]

    def layouts(
        self, text_column: str, progress: Callable[[], None] | None = None, damaged: Damage | None = None
    ) -> Iterator[Layout]:
        pieces = (
            Piece(
                name=name,
                path=str(path),
                kind=kind_of(name) or "",
                version=local_version(stat),
                size_bytes=stat.st_size,
            )
            for name, path, stat in self.files
        )
        return _layouts(pieces, text_column, progress, damaged, num_threads=_LOCAL_READERS)


@dataclass(frozen=True)
class RemoteFiles:
    """Files of the hub, of a bucket or of a web server, each at the version it had when it was listed."""

    source: str
    pinned: str | None
    files: tuple[RemoteFile, ...]

    @classmethod
    def find(cls, source: str) -> RemoteFiles:
        pinned, files = remote_files.list_files(source)
        files = [file for file in files if kind_of(file.name) is not None]
        if not files:
            raise UserError(f"no {_known_suffixes()} file matches the source {source}")
        return cls(source, pinned, tuple(files))

    def inputs(self) -> list[Input]:
        commit = f"{self.pinned.partition('@')[2].partition('/')[0]} " if self.pinned else ""
        return [Input(name=file.name, version=commit + file.version, size_bytes=file.size_bytes) for file in self.files]

    def layouts(
        self, text_column: str, progress: Callable[[], None] | None = None, damaged: Damage | None = None
    ) -> Iterator[Layout]:
        pieces = (
            Piece(
                name=file.name,
                path="",
                kind=kind_of(file.name) or "",
                version=file.version or f"{file.size_bytes} bytes",
                size_bytes=file.size_bytes,
                file=file,
            )
            for file in self.files
        )
        return _layouts(pieces, text_column, progress, damaged, num_threads=_REMOTE_READERS)


@dataclass(frozen=True)
class InstalledDocs:
    """The docstrings of the Python packages installed here (see docstrings.py)."""

    @property
    def pinned(self) -> None:
        return None

    def inputs(self) -> list[Input]:
        return [Input(name=name, version=version) for name, version in docstrings.versions().items()]

    def layouts(
        self, text_column: str, progress: Callable[[], None] | None = None, damaged: Damage | None = None
    ) -> Iterator[Layout]:
        pieces = (
            Piece(name=name, path=str(path), kind="py", version=local_version(stat), size_bytes=stat.st_size)
            for name, path, stat in docstrings.find_files()
        )
        return _layouts(pieces, text_column, progress, damaged, num_threads=1)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the name's end; None for what cannot be read."""
    stem = name
    for compression in COMPRESSIONS:
        stem = stem.removesuffix(compression)
    kind = SUFFIXES.get(Path(stem).suffix)
    return None if kind == "parquet" and stem != name else kind


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether a column of this type holds text, dictionary-encoded or not."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return bool(
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or arrow_type == pa.string_view()
    )


def _layouts(
    pieces: Iterable[Piece],
    text_column: str,
    progress: Callable[[], None] | None,
    damaged: Damage | None,
    *,
    num_threads: int,
) -> Iterator[Layout]:
    def layout(piece: Piece) -> Layout | DamagedInputError:
        try:
            return _row_groups(piece, text_column) if piece.kind == "parquet" else _ranges(piece)
        except DamagedInputError as error:
            return error

    def results() -> Iterator[tuple[Piece, Layout | DamagedInputError]]:
        pool = ThreadPoolExecutor(num_threads)
        waiting: deque[tuple[Piece, Future[Layout | DamagedInputError]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(layout, piece)))
                if len(waiting) > 4 * num_threads:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)

    for piece, result in results():
        if progress:
            progress()
        if isinstance(result, Layout):
            yield result
        elif damaged is None:
            raise result
        else:
            damaged.append({"name": piece.name, "reason": str(result)})


def _row_groups(whole: Piece, text_column: str) -> Layout:
    """One unit per row group, after a look at the schema."""
    with reading(whole.where), open_piece(whole) as file:
        metadata = pq.read_metadata(file)
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
    with reading(whole.where):
        chunks = text_chunks(metadata, text_column, range(metadata.num_row_groups))
    return Layout(
        whole=whole,
        bounds=np.arange(len(chunks) + 1),
        sizes=np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64),
        documents=np.array([chunk.num_values for chunk in chunks], np.int64),
    )


def _ranges(whole: Piece) -> Layout:
    """Byte ranges of a plain .jsonl file; anything else is read whole."""
    if whole.is_range:
        bounds = np.append(np.arange(0, whole.size_bytes, _RANGE_BYTES), whole.size_bytes)
        return Layout(whole=whole, bounds=bounds, sizes=np.diff(bounds))
    documents = None if whole.kind == "jsonl" else 1
    if whole.name.endswith(COMPRESSIONS):
        whole = dataclasses.replace(whole, size_bytes=whole.size_bytes * _COMPRESSED_TO_TEXT)
    return Layout.undivided(whole, documents=documents)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first wildcard."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _known_suffixes() -> str:
    return ".parquet, .jsonl or .txt (the last two also .gz or .zst)"


def resolve_source(source: str) -> str:
    """Return a source as every worker finds it: relative paths become absolute, addresses and installed-docs stay."""
    return source if source == INSTALLED_DOCS else in_bucket(source) or str(resolve_path(source))
