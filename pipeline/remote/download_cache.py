"""A folder of this node for remote files while they are read: fetched, verified, opened, deleted.

Several processes share the folder and its limit. A download appends to a ``.part`` file, so a killed process leaves the
beginning of the file, and the next process that fetches it resumes there. Each file in use is locked (flock, which ends
with its process); a file that nobody has locked is a leftover, which is deleted when its space is needed. The locks of
files are flock by hand, because the lock is on the file itself, which filelock cannot do.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile, stored_url
from pipeline.storage.folders import write_error
from pipeline.storage.locks import process_lock, try_flock

_NAME = re.compile(r"[0-9a-f]{32}-(?P<size>\d+)(?:\..*)?")
_LOCK_NAME = ".lock"
_POLL_SECONDS = 0.2  # between two looks for space
_BLOCK_BYTES = 8 << 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Remote files in ``folder``, which holds nothing else, with a limit of ``max_bytes`` in all."""

    folder: Path
    max_bytes: int

    @contextlib.contextmanager
    def file(self, file: RemoteFile, progress: Callable[[int], None] | None = None) -> Iterator[Path]:
        """The whole file on disk while the block runs, its size and (where known) its checksum verified.

        progress: called with the number of bytes that are there, again and again; those of a killed download count.

        It waits for space, and for another reader of the same file, so the block must not open a second file.

        Raises:
            DamagedInputError: wrong checksum twice, gone, or changed since it was listed.
            UserError: the file is larger than the cache, the disk is full, or the place cannot be reached.
        """
        if file.size_bytes > self.max_bytes:
            raise UserError(
                f"{file.where} has {file.size_bytes:,} bytes, more than the {self.max_bytes:,} of the cache in "
                f"{self.folder}; raise --cache_bytes"
            )
        with contextlib.closing(self._take(file)) as slot:
            try:
                slot.fill(file, progress)
            except DamagedInputError:
                with self._locked():
                    slot.part.unlink()
                raise
            with self._locked():
                slot.part.rename(slot.path)
            try:
                yield slot.path
            finally:
                with self._locked():
                    slot.path.unlink(missing_ok=True)

    def _take(self, file: RemoteFile) -> _Slot:
        """The locked place of a file, once there is space for all of it."""
        began = time.monotonic()
        said = False
        while True:
            with self._locked():
                slot = self._try_to_take(file)
            if slot is not None:
                return slot
            if not said and time.monotonic() - began > 60:
                said = True
                _logger.warning("waiting for room for %s in the cache %s", file.where, self.folder)
            time.sleep(_POLL_SECONDS)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """The folder, held for a moment against all other processes and threads."""
        return process_lock(self.folder / _LOCK_NAME)

    def _try_to_take(self, file: RemoteFile) -> _Slot | None:
        """None where another reader has the file, or there is no space for it now."""
        key = _key(file)
        path = self.folder / f"{key}{''.join(Path(file.name).suffixes[-2:])[-20:]}"
        part = self.folder / f"{key}.part"
        if _is_in_use(path) or _is_in_use(part) or not self._make_room(file.size_bytes, {path.name, part.name}):
            return None
        try:
            if path.exists():  # its reader was killed
                path.rename(part)
            handle = part.open("a+b", buffering=0)
        except OSError as error:
            raise write_error(part, error) from error
        if not try_flock(handle):
            raise RuntimeError(f"{part} was locked by somebody who did not lock {self.folder}")
        return _Slot(path=path, part=part, handle=handle)

    def _make_room(self, num_bytes: int, own: set[str]) -> bool:
        """Whether ``num_bytes`` fit. Files in use count as whole; leftovers are deleted as needed, the oldest first."""
        free_bytes = self.max_bytes - num_bytes
        left_over = []
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or path.name in own:
                continue
            if _is_in_use(path):
                free_bytes -= int(match["size"])
            else:
                stat = path.stat()
                left_over.append((stat.st_mtime_ns, stat.st_size, path))
        if free_bytes < 0:
            return False
        kept_bytes = sum(size for _, size, _ in left_over)
        for _, size, path in sorted(left_over):
            if kept_bytes <= free_bytes:
                break
            path.unlink()
            kept_bytes -= size
        return True


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """A file's place in the cache, locked until it is closed."""

    path: Path
    """Path of the whole, verified file."""
    part: Path
    """Path of the part that is there until then."""
    handle: IO[bytes]
    """The part, opened for appending."""

    def close(self) -> None:
        self.handle.close()

    def fill(self, file: RemoteFile, progress: Callable[[int], None] | None) -> None:
        """Fetch the rest; a file with a wrong checksum is fetched once more, from the start."""
        found = expected = ""
        for _ in range(2):
            found, expected = self._append(file, progress)
            if found == expected:
                return
            _logger.warning("%s arrived with a wrong checksum", file.where)
            self.handle.truncate(0)
        raise DamagedInputError(
            f"{file.where} is damaged: it arrived twice with the checksum {found}, and should have {expected}"
        )

    def _append(self, file: RemoteFile, progress: Callable[[int], None] | None) -> tuple[str, str]:
        """Fetch the rest; returns the checksum found and the one expected."""
        digest, expected = _digest_of(file)

        def note(block: bytes) -> int:
            if digest:
                digest.update(block)
            if progress:
                progress(len(block))
            return len(block)

        if not file.version:  # nothing says whether the rest belongs to the part
            self.handle.truncate(0)
        present_bytes = 0
        self.handle.seek(0)
        while block := self.handle.read(_BLOCK_BYTES):
            present_bytes += note(block)
        with contextlib.closing(remote_files.stream(file, present_bytes)) as chunks:
            for chunk in chunks:
                self._write(chunk)
                note(chunk)
        return (digest.hexdigest() if digest else ""), expected

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            try:
                rest = rest[self.handle.write(rest) :]
            except OSError as error:
                raise write_error(self.part, error) from error


def _key(file: RemoteFile) -> str:
    """A name by hash of the content, or else of the address, and by the size of the whole file.

    Where an ETag tells the content, the query of an address does not count: a signature that was renewed is in it.
    """
    identity = file.version
    if not identity.startswith(("sha256:", "blob:")):
        identity = f"{stored_url(file.url) if identity.startswith('etag:') else file.url} {identity}"
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{file.size_bytes}"


def _digest_of(file: RemoteFile) -> tuple[Any, str]:
    """A digest to update, and the expected checksum; None and empty where it is not known."""
    kind, _, expected = file.version.partition(":")
    if kind == "sha256":
        return hashlib.sha256(), expected
    if kind == "blob":  # git's hash of a file
        return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False), expected
    return None, ""


def _is_in_use(path: Path) -> bool:
    """Whether any process, this one too, has the file locked."""
    try:
        with path.open("rb") as handle:
            return not try_flock(handle)
    except FileNotFoundError:
        return False
