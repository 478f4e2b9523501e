"""The files of a source, and the layout of each file: where it can be divided (plan.py divides it).

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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError, UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile
from pipeline.sources import docstrings
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.work_items import COMPRESSIONS, Damage, FileSlice, local_version, open_slice, reading

A = TypeVar("A")
B = TypeVar("B")

INSTALLED_DOCS = "installed-docs"
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
_KNOWN_SUFFIXES = ".parquet, .jsonl or .txt (the last two also .gz or .zst)"
_RANGE_BYTES = 4_000_000  # unit of plain .jsonl files
_COMPRESSED_TO_TEXT = 3  # estimated bytes of text per byte of .gz or .zst, for plans only
_LOCAL_READERS = 8  # footers are read from disks that may be slow, such as network disks
_REMOTE_READERS = 32


@dataclass(frozen=True, kw_only=True)
class Input:
    """One file or package that a source reads, as the manifest lists it."""

    name: str
    """Name relative to the source."""
    version: str = ""
    """Hash or ETag of a remote file, or version of a package, which pins the content; empty for local files."""
    size_bytes: int | None = None
    mtime_ns: int | None = None
    """Time of change of a local file, by which this machine sees that it changed; not in the manifest."""

    def manifest_entry(self) -> dict[str, Any]:
        """The values that are the same on every machine."""
        return {"name": self.name, "version": self.version, "size_bytes": self.size_bytes}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One file and where it can be divided: n units, which take 24 bytes of memory each."""

    whole: FileSlice
    bounds: npt.NDArray[np.int64]
    """(n + 1,) Unit i is [bounds[i], bounds[i + 1]): one row group, a range of bytes, or the whole file."""
    sizes: npt.NDArray[np.int64]
    """(n,) Approximate bytes of text."""
    documents: npt.NDArray[np.int64] | None = None
    """(n,) Number of records; None where the file would have to be read for it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that a name stands for, as they were when they were listed."""

    inputs: list[Input]
    """All inputs, in the order of reading; no file has been opened for it."""
    whole_files: Callable[[], Iterable[FileSlice]]
    """Lists every file as one slice, in the order of reading."""
    num_threads: int
    """Number of threads that read footers."""
    pinned: str | None = None
    """The source at a fixed revision of the hub; None where there is no such thing."""

    def layouts(
        self, text_column: str, progress: Callable[[], None] | None = None, damaged: Damage | None = None
    ) -> Iterator[Layout]:
        """The files in order; footers are read in threads a little ahead of the caller, who may stop.

        Args:
            text_column: the column of parquet files that holds the text.
            progress: called once per file.
            damaged: takes a note of every file whose footer cannot be read, which is then left out.

        Raises:
            DamagedInputError: a footer cannot be read, and ``damaged`` is not given.
            UserError: a file has no text in ``text_column``.
        """

        def layout(whole: FileSlice) -> Layout | DamagedInputError:
            try:
                return _row_groups(whole, text_column) if whole.kind == "parquet" else _ranges(whole)
            except DamagedInputError as error:
                return error

        for whole, result in _ahead(layout, self.whole_files(), self.num_threads):
            if progress:
                progress()
            if isinstance(result, Layout):
                yield result
            elif damaged is None:
                raise result
            else:
                damaged.append({"name": whole.name, "reason": str(result)})


def find(source: str) -> Source:
    """List the source of a name; raises UserError where there is nothing of that name."""
    if source == INSTALLED_DOCS:
        return _installed_docs()
    if remote_files.is_remote(source):
        return _remote_source(source)
    if "://" in source:
        raise UserError(
            f"source {source} is none that can be read: a local path, hf://datasets/..., s3://..., gs://..., "
            f"https://... or {INSTALLED_DOCS}"
        )
    return _local_source(source)


def resolve_source(source: str) -> str:
    """Return a source as every worker finds it: relative paths become absolute, addresses and installed-docs stay."""
    return source if source == INSTALLED_DOCS else in_bucket(source) or str(resolve_path(source))


def _local_source(source: str) -> Source:
    """A file, the files of a folder and its subfolders, or those that match a glob; names are relative to it."""
    files = [(name, path, path.stat()) for name, path in _local_files(source)]
    return Source(
        inputs=[Input(name=name, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns) for name, _, stat in files],
        whole_files=lambda: (_local_file(name, path, stat, kind_of(name) or "") for name, path, stat in files),
        num_threads=_LOCAL_READERS,
    )


def _local_files(source: str) -> list[tuple[str, Path]]:
    path = Path(source).expanduser()
    if path.is_file():
        if kind_of(path.name) is None:
            raise UserError(f"source {source} is no {_KNOWN_SUFFIXES} file")
        return [(path.name, path.absolute())]
    if path.is_dir():
        base, matches = path, path.rglob("*")
        problem = f"source folder {source} holds no {_KNOWN_SUFFIXES} file"
    elif glob.has_magic(source):
        base = path
        while glob.has_magic(str(base)):  # up to the folder above the first wildcard
            base = base.parent
        matches = base.glob(path.relative_to(base).as_posix())
        problem = f"no {_KNOWN_SUFFIXES} file matches the source {source}"
    else:
        raise UserError(f"source {source} does not exist (looked for {path.absolute()})")
    named = sorted((match.relative_to(base).as_posix(), match.absolute()) for match in matches)
    shown = (entry for entry in named if "/." not in f"/{entry[0]}")
    files = [(name, file) for name, file in shown if kind_of(name) and file.is_file()]
    if not files:
        raise UserError(problem)
    return files


def _remote_source(source: str) -> Source:
    """Files of the hub, of a bucket or of a web server, each at the version that it has now."""
    pinned, files = remote_files.list_files(source)
    files = [file for file in files if kind_of(file.name) is not None]
    if not files:
        raise UserError(f"no {_KNOWN_SUFFIXES} file matches the source {source}")
    commit = f"{pinned.partition('@')[2].partition('/')[0]} " if pinned else ""
    return Source(
        inputs=[Input(name=file.name, version=commit + file.version, size_bytes=file.size_bytes) for file in files],
        whole_files=lambda: map(_remote_file, files),
        num_threads=_REMOTE_READERS,
        pinned=pinned,
    )


def _installed_docs() -> Source:
    """The docstrings of the Python packages installed here (see docstrings.py)."""
    return Source(
        inputs=[Input(name=name, version=version) for name, version in docstrings.versions().items()],
        whole_files=lambda: (_local_file(*file, "py") for file in docstrings.find_files()),
        num_threads=1,
    )


def _local_file(name: str, path: Path, stat: os.stat_result, kind: str) -> FileSlice:
    return FileSlice(name=name, path=str(path), kind=kind, version=local_version(stat), size_bytes=stat.st_size)


def _remote_file(file: RemoteFile) -> FileSlice:
    version = file.version or f"{file.size_bytes} bytes"
    kind = kind_of(file.name) or ""
    return FileSlice(name=file.name, path="", kind=kind, version=version, size_bytes=file.size_bytes, file=file)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def kind_of(name: str) -> str | None:
    """parquet, jsonl or txt by the suffix of the name; None for a file that cannot be read."""
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


def _ahead(function: Callable[[A], B], items: Iterable[A], num_threads: int) -> Iterator[tuple[A, B]]:
    """(item, function(item)) in order; threads compute up to four items per thread ahead of the caller."""
    waiting: deque[tuple[A, Future[B]]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 4 * num_threads:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _row_groups(whole: FileSlice, text_column: str) -> Layout:
    """The layout of a parquet file: one unit per row group. Checks that the column holds text."""
    with reading(whole.where), open_slice(whole) as file:
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


def _ranges(whole: FileSlice) -> Layout:
    """The layout of other files: ranges of bytes of a plain .jsonl file; anything else is read whole."""
    if whole.is_range:
        bounds = np.append(np.arange(0, whole.size_bytes, _RANGE_BYTES), whole.size_bytes)
        return Layout(whole=whole, bounds=bounds, sizes=np.diff(bounds))
    documents = None if whole.kind == "jsonl" else np.array([1])
    if whole.name.endswith(COMPRESSIONS):
        whole = dataclasses.replace(whole, size_bytes=whole.size_bytes * _COMPRESSED_TO_TEXT)
    return Layout(whole=whole, bounds=np.array([0, 1]), sizes=np.array([whole.size_bytes]), documents=documents)
