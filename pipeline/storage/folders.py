"""Folders to write to, on a disk or in a bucket: s3:// (and stores that speak its language) and gs://.

Every file appears whole or not at all: on a disk it is written under a temporary name, flushed, then renamed; in a
bucket by one request, or by an upload in parts that is completed last and aborted on any failure. A writer that is
killed in a bucket leaves parts that no listing shows and the store charges for: give the bucket a rule that removes
incomplete uploads after a few days. Errors that the user can mend are UserErrors. Retries: object_store.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from pipeline.errors import UserError
from pipeline.storage.object_store import bucket_errors, bucket_store, http_status, parse_url

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

TEMPORARY_PREFIX = ".tmp-"
Flush: TypeAlias = Literal["name", "content", "nothing"]
CACHE_VARIABLE = "GPT25_CACHE"

R = TypeVar("R")
T = TypeVar("T")

_PART_BYTES = 16 << 20  # 10,000 parts, the most there may be, are 160 GB
_PARTS_AT_ONCE = 4
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Folder(Protocol):
    """A folder for files, whose names may have slashes. Cheap to make, to compare and to send to another process."""

    @property
    def url(self) -> str:
        """Absolute path, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX; also what ``str`` gives."""

    def make(self) -> None:
        """Make the folder if need be; raises UserError where no files can be written to it."""

    def write(self, name: str, parts: Iterable[bytes | memoryview], *, flush: Flush = "name") -> str:
        """Write a file, whole or not at all; returns the sha256 of what was written (hexadecimal).

        flush: what is on the disk when the call returns, so that it survives a power failure: the content and its
            "name"; the "content", so that a file of this name is whole if it exists; or "nothing" of it.
        """

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError where it is absent."""

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)``, fewer where the file ends sooner; FileNotFoundError where it is absent."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is absent."""

    def names(self, prefix: str = "") -> list[str]:
        """Every file whose name begins with ``prefix``, in sub-folders too, sorted; temporary files left out."""

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed writers."""


def is_url(text: str) -> bool:
    """Whether ``text`` is SCHEME://..., not a path."""
    return _URL.match(text) is not None


def in_bucket(text: str) -> bool:
    """Whether ``text`` is the URL of a bucket or of something in one."""
    return text.startswith(("s3://", "gs://"))


def open_folder(url: str | Path) -> Folder:
    """The folder at a path or a bucket's URL, without any access to it. Raises UserError for a URL of another kind."""
    if isinstance(url, Path) or not is_url(url):
        return LocalFolder(url=str(Path(url).expanduser().absolute()))
    scheme, bucket, key = parse_url(url)
    prefix = "/".join(part for part in key.split("/") if part)
    return BucketFolder(url=f"{scheme}://{bucket}/{prefix}".rstrip("/"))


def as_folder(folder: Folder | Path) -> Folder:
    """``folder`` itself, or the folder at a path."""
    return open_folder(folder) if isinstance(folder, Path) else folder


def node_cache(name: str) -> Path:
    """The folder ``name`` for large files of this node that can be fetched again.

    It is in $GPT25_CACHE, which may be on another disk, or else in ~/.cache/gpt-2.5.
    """
    base = os.environ.get(CACHE_VARIABLE) or "~/.cache/gpt-2.5"
    return Path(base).expanduser().absolute() / name


def in_threads(function: Callable[[T], R], items: Sequence[T], num_threads: int) -> list[R]:
    """The result of ``function`` for each of ``items``, several at a time; raises the first error.

    After an error, and after Ctrl-C, no further item is begun. Takes 8 bytes of memory per item and its result, since
    there may be millions.
    """
    numbers = iter(range(len(items)))  # its next() is atomic
    results: list[Any] = [None] * len(items)

    def work() -> None:
        for number in numbers:
            results[number] = function(items[number])

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(min(num_threads, len(items)))]):
                future.result()
        finally:
            for _ in numbers:  # so that none is left to begin
                pass
    return results


# ---- on a disk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalFolder:
    """A folder on a disk of this machine, or on a shared file system."""

    url: str
    """Absolute path."""

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        return Path(self.url)

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "there is a file of that name" if isinstance(error, FileExistsError) else error.strerror
            raise UserError(f"output folder {self} cannot be made: {reason}; choose another --output") from error
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"output folder {self} cannot be written: {os.strerror(errno.EACCES)}")

    def write(self, name: str, parts: Iterable[bytes | memoryview], *, flush: Flush = "name") -> str:
        path = self._path(name)
        if "/" in name:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(path, error) from error
        return write_atomically(path, parts, flush=flush)

    def read(self, name: str) -> bytes:
        with self._open_errors(name):
            return self._path(name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with self._open_errors(name), self._path(name).open("rb") as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            with self._open_errors(name):
                return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def names(self, prefix: str = "") -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.path / prefix.rpartition("/")[0]):
            relative = Path(folder).relative_to(self.path).as_posix()
            base = "" if relative == "." else f"{relative}/"
            folders[:] = [name for name in folders if _may_hold(f"{base}{name}/", prefix)]
            found += [base + name for name in files if (base + name).startswith(prefix)]
        return sorted(name for name in found if not _is_temporary(name))

    def delete(self, name: str) -> None:
        try:
            self._path(name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise UserError(f"{self._path(name)} cannot be deleted: {error.strerror}") from error

    def remove_leftovers(self) -> None:
        for folder, _, files in os.walk(self.path):
            for name in files:
                if name.startswith(TEMPORARY_PREFIX):
                    (Path(folder) / name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.path / _checked(name)

    @contextlib.contextmanager
    def _open_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path(name))) from None
        except OSError as error:
            raise UserError(f"{self._path(name)} cannot be read: {error.strerror}") from error


def write_atomically(path: Path, parts: Iterable[bytes | memoryview], *, flush: Flush = "name") -> str:
    """Write ``parts`` to ``path``, whole or not at all, and return the sha256 of what was written (hexadecimal).

    A full disk is a UserError and leaves nothing behind; a killed process leaves a ``.tmp-`` file at most. ``parts``
    must not raise OSErrors: they would be taken for failures of the disk.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            if flush != "nothing":
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if flush == "name":
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_error(path: Path, error: OSError) -> UserError:
    """The error message for a ``path`` that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {path.parent} is full: {path.name} could not be written; "
            "make room, then run the same command again"
        )
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _may_hold(folder: str, prefix: str) -> bool:
    """Whether names in ``folder`` (which ends with a slash) can begin with ``prefix``."""
    return folder.startswith(prefix) or prefix.startswith(folder)


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


def is_file_name(name: str) -> bool:
    """Whether ``name``, which may have slashes, is that of a file within a folder: names come from files of others."""
    return {"", ".", ".."}.isdisjoint(name.split("/")) and "\0" not in name


def _checked(name: str) -> str:
    if not is_file_name(name):
        raise UserError(f"{name!r} is no name of a file in a folder")
    return name


# ---- in a bucket -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BucketFolder:
    """The keys of a bucket that begin with a prefix."""

    url: str
    """s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, no slash at its end."""

    def __str__(self) -> str:
        return self.url

    def make(self) -> None:
        name, content = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}", b"can this be written?\n"
        self.write(name, [content])
        try:
            if self.read(name) != content:
                raise UserError(f"{self} gives back other bytes than were written; it cannot be used")
        except FileNotFoundError:
            raise UserError(f"{self} does not show a file that was just written; it cannot be used") from None
        finally:
            self.delete(name)

    def write(self, name: str, parts: Iterable[bytes | memoryview], *, flush: Flush = "name") -> str:
        del flush  # a bucket keeps everything that it has accepted
        import obstore

        store, key = self._locate(name)
        digest = hashlib.sha256()
        stream = _digested(parts, digest)
        first, first_bytes = [], 0
        while first_bytes < _PART_BYTES and (part := next(stream, None)) is not None:
            first.append(part)
            first_bytes += len(part)
        with bucket_errors(f"{self}/{name}", writing=True):
            if first_bytes < _PART_BYTES:
                obstore.put(store, key, b"".join(first), use_multipart=False)
            else:  # the upload is aborted when the iterator raises
                chain = itertools.chain(first, stream)
                obstore.put(store, key, chain, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        import obstore

        store, key = self._locate(name)
        with bucket_errors(f"{self}/{name}"):
            return obstore.get(store, key).bytes().to_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        import obstore
        from obstore.exceptions import BaseError

        store, key = self._locate(name)
        with bucket_errors(f"{self}/{name}"):
            if stop <= start:
                obstore.head(store, key)
                return b""
            try:
                return obstore.get_range(store, key, start=start, end=stop).to_bytes()
            except BaseError as error:
                if http_status(error) != 416:  # 416: the file ends before the range begins
                    raise
                return b""

    def size(self, name: str) -> int | None:
        import obstore

        store, key = self._locate(name)
        try:
            with bucket_errors(f"{self}/{name}"):
                return obstore.head(store, key)["size"]
        except FileNotFoundError:
            return None

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._all_names(prefix) if not _is_temporary(name)]

    def delete(self, name: str) -> None:
        import obstore

        store, key = self._locate(name)
        with contextlib.suppress(FileNotFoundError), bucket_errors(f"{self}/{name}", writing=True):
            obstore.delete(store, key)

    def remove_leftovers(self) -> None:
        """Remove files with temporary names; an upload that was not completed is no file."""
        for name in self._all_names():
            if _is_temporary(name):
                self.delete(name)

    def _all_names(self, prefix: str = "") -> list[str]:
        import obstore

        store, root = bucket_store(self.url)
        base = f"{root}/" if root else ""
        folder = base + prefix.rpartition("/")[0]  # object stores list by whole parts of a path
        with bucket_errors(self.url):
            keys = [entry["path"] for page in obstore.list(store, folder or None) for entry in page]
        names = (key.removeprefix(base) for key in keys)
        return sorted(name for name in names if name.startswith(prefix))

    def _locate(self, name: str) -> tuple[S3Store | GCSStore, str]:
        return bucket_store(f"{self.url}/{_checked(name)}")


def _digested(parts: Iterable[bytes | memoryview], digest: Any) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        digest.update(view)
        yield view
