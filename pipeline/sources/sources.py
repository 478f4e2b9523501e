"""The files of a source, and the layout of each file: where it can be divided (plan.py divides it).

A source is a local file, folder or glob, the same on the Hugging Face hub or in a bucket, one file of a web server, or
the docstrings of the Python packages installed here. Listings and parquet footers are all that is read here. Names are
relative to the source, with no path of this machine in them, so every machine plans the same items.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.local_files import list_tree, split_source
from pipeline.listing.selection import KNOWN, Ignored, compression_of, describe, kind_of, mixture, select
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile, redact_url
from pipeline.sources import docstrings, tables
from pipeline.sources.parquet_metadata import text_chunks
from pipeline.sources.text_columns import find_columns
from pipeline.sources.work_items import (
    Damage,
    FileSlice,
    NoTextError,
    explained,
    local_version,
    open_slice,
    reading,
    require_no_pointer,
)

A = TypeVar("A")
B = TypeVar("B")

INSTALLED_DOCS = "installed-docs"
_RANGE_BYTES = 4_000_000  # unit of plain .jsonl files
_COMPRESSED_TO_TEXT = 3  # estimated bytes of text per compressed byte, for plans only
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
    ignored: tuple[Ignored, ...] = ()
    """What lies in the source and is not read."""
    mixed: str | None = None
    """A sentence where text files lie among files of records."""
    problems: tuple[tuple[str, UserError], ...] = ()
    """Name of what may be, or hold, a file of the source and cannot be looked at, and why: a link, a closed folder."""

    def layouts(
        self,
        text_column: str,
        progress: Callable[[], None] | None = None,
        damaged: Damage | None = None,
        *,
        has_separator: bool = False,
    ) -> Iterator[Layout]:
        """The files in order; footers are read in threads a little ahead of the caller, who may stop.

        Args:
            text_column: the column of parquet files that holds the text.
            progress: called once per file.
            damaged: takes a note of every file without text in ``text_column``, or whose footer cannot be read; it is
                then left out.
            has_separator: whether text files hold many documents with a separator between them.

        Raises:
            DamagedInputError: a footer cannot be read, a link leads nowhere, a file is a git-LFS pointer, and
                ``damaged`` is not given.
            UserError: a file has no text in ``text_column``, and ``damaged`` is not given; a folder is closed to this
                user.
        """

        def layout(whole: FileSlice) -> Layout | DamagedInputError | NoTextError:
            if has_separator and whole.kind == "txt":
                whole = dataclasses.replace(whole, kind="documents")
            try:
                return _layout(whole, text_column)
            except (DamagedInputError, NoTextError) as error:
                return error

        for name, problem in self.problems:
            if damaged is None or not isinstance(problem, DamagedInputError):
                raise problem
            damaged.append({"name": name, "reason": str(problem)})
        for whole, result in _ahead(layout, self.whole_files(), self.num_threads):
            if damaged is None and not isinstance(result, Layout):
                raise UserError(str(result)) if isinstance(result, NoTextError) else result
            if progress:
                progress()
            if isinstance(result, Layout):
                yield result
            elif damaged is not None:
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
    path = Path(source).expanduser()
    place = split_source(path)
    if place is None and path.is_file():
        return _local_files([(path.name, path.absolute(), _kind_of_one(path.name, source))])
    if place is None:
        what = "is no regular file" if path.exists() else f"does not exist (looked for {path.absolute()})"
        raise UserError(f"source {source} {what}")
    base, pattern = place
    tree = list_tree(base.absolute(), pattern)
    selection = select(tree.names, pattern, tree.found)
    files = [(name, base.absolute() / name, kind) for name, kind in selection.kinds.items()]
    if not files and not tree.problems:
        raise _nothing(source, selection.ignored)
    return dataclasses.replace(
        _local_files(files),
        ignored=selection.ignored,
        mixed=mixture(selection.kinds),
        problems=tuple(tree.problems),
    )


def _local_files(files: list[tuple[str, Path, str]]) -> Source:
    stats = [path.stat() for _, path, _ in files]
    return Source(
        inputs=[
            Input(name=name, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
            for (name, _, _), stat in zip(files, stats, strict=True)
        ],
        whole_files=lambda: (
            _local_file(name, path, stat, kind) for (name, path, kind), stat in zip(files, stats, strict=True)
        ),
        num_threads=_LOCAL_READERS,
    )


def _kind_of_one(name: str, source: str) -> str:
    """The kind of a file that is named in full."""
    kind = kind_of(name)
    if kind is None:
        raise UserError(f"source {source} is no {KNOWN} file")
    return kind


def _nothing(source: str, ignored: tuple[Ignored, ...]) -> UserError:
    passed_over = f"; what is there is not read: {describe(ignored)}" if ignored else ""
    return UserError(f"no {KNOWN} file matches the source {source}{passed_over}")


def _remote_source(source: str) -> Source:
    """Files of the hub, of a bucket or of a web server, each at the version that it has now."""
    tree = remote_files.list_tree(source)
    where = redact_url(source)
    ignored: tuple[Ignored, ...] = ()
    mixed = None
    if tree.is_file:
        chosen = [(file, _kind_of_one(file.name, where)) for file in tree.files.values()]
    else:
        selection = select(tree.files, tree.pattern)
        chosen = [(tree.files[name], kind) for name, kind in selection.kinds.items()]
        ignored, mixed = selection.ignored, mixture(selection.kinds)
    if not chosen:
        raise _nothing(where, ignored)
    commit = f"{tree.pinned.partition('@')[2].partition('/')[0]} " if tree.pinned else ""
    return Source(
        inputs=[Input(name=file.name, version=commit + file.version, size_bytes=file.size_bytes) for file, _ in chosen],
        whole_files=lambda: (_remote_file(file, kind) for file, kind in chosen),
        num_threads=_REMOTE_READERS,
        pinned=tree.pinned,
        ignored=ignored,
        mixed=mixed,
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


def _remote_file(file: RemoteFile, kind: str) -> FileSlice:
    version = file.version or f"{file.size_bytes} bytes"
    return FileSlice(name=file.name, path="", kind=kind, version=version, size_bytes=file.size_bytes, file=file)


# ---- layouts ---------------------------------------------------------------------------------------------------------


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
    """The layout of a parquet file: one unit per row group. LookupError where the column holds no text."""
    with reading(whole.where), open_slice(whole) as file:
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    find_columns(schema, text_column)
    with reading(whole.where):
        chunks = text_chunks(metadata, text_column, range(metadata.num_row_groups))
    return Layout(
        whole=whole,
        bounds=np.arange(len(chunks) + 1),
        sizes=np.array([sum(chunk.total_uncompressed_size for chunk in columns) for columns in chunks], np.int64),
        documents=np.array([metadata.row_group(group).num_rows for group in range(len(chunks))], np.int64),
    )


def _layout(whole: FileSlice, text_column: str) -> Layout:
    """The layout of a file, which is looked at as far as its kind needs it."""
    require_no_pointer(whole)
    try:
        if whole.kind == "parquet":
            return _row_groups(whole, text_column)
        if whole.kind in ("arrow", "csv", "tsv"):
            tables.check_table(whole, text_column)
    except LookupError as error:
        raise explained(whole, NoTextError(f"{whole.where} {error.args[0]}")) from error
    except UserError as error:
        raise explained(whole, error) from error
    return _ranges(whole)


def _ranges(whole: FileSlice) -> Layout:
    """The layout of other files: ranges of bytes of plain lines or documents; anything else is read whole."""
    if whole.is_range:
        bounds = np.append(np.arange(0, whole.size_bytes, _RANGE_BYTES), whole.size_bytes)
        return Layout(whole=whole, bounds=bounds, sizes=np.diff(bounds))
    documents = np.array([1]) if whole.kind in ("txt", "py") else None
    if compression_of(whole.name):
        whole = dataclasses.replace(whole, size_bytes=whole.size_bytes * _COMPRESSED_TO_TEXT)
    return Layout(whole=whole, bounds=np.array([0, 1]), sizes=np.array([whole.size_bytes]), documents=documents)
