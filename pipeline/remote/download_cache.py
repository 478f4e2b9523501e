"""A folder of this machine for remote files that are being read: fetched, verified, handed out, deleted.

Several processes share the folder and its bound. A download grows a ``.part`` file from its start, so what a killed
process leaves is the beginning of the file, and whoever fetches it next goes on from there. Each file in use is locked
(flock, which ends with its process); what nobody has locked is left over, and goes when its room is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import files as remote_files
from pipeline.remote.files import RemoteFile
from pipeline.storage.folders import write_error
from pipeline.storage.locks import process_lock

_NAME = re.compile(r"[0-9a-f]{32}-(?P<size>\d+)(?:\..*)?")
_LOCK_NAME = ".lock"
_LOOK_SECONDS = 0.2  # between two looks for room
_BLOCK_BYTES = 8 << 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Files of ``folder``, which is for nothing else, together never above ``max_bytes``."""

    folder: Path
    max_bytes: int

    @contextlib.contextmanager
    def file(self, file: RemoteFile) -> Iterator[Path]:
        """The whole file on disk, its size and checksum verified (where there is one), as long as the block runs.

        Waits for room, and for another reader of the same file; so ask for no second file inside the block.

        Raises:
            DamagedInputError: wrong checksum twice, gone, or changed since it was listed.
            UserError: larger than the cache, no room on the disk, the place cannot be reached.
        """
        if file.size_bytes > self.max_bytes:
            raise UserError(
                f"{file.where} has {file.size_bytes:,} bytes, more than the {self.max_bytes:,} of the cache in "
                f"{self.folder}; raise --cache_bytes"
            )
        with contextlib.closing(self._take(file)) as slot:
            try:
                slot.fill(file)
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
        """The file's place, this process's own, once there is room for all of it."""
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
            time.sleep(_LOOK_SECONDS)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """The folder, held for a moment against all other processes and threads."""
        return process_lock(self.folder / _LOCK_NAME)

    def _try_to_take(self, file: RemoteFile) -> _Slot | None:
        """None where somebody else reads the file, or there is no room for it now."""
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
        if not _lock(handle):
            raise RuntimeError(f"{part} was locked by somebody who did not lock {self.folder}")
        return _Slot(path=path, part=part, handle=handle)

    def _make_room(self, num_bytes: int, own: set[str]) -> bool:
        """Whether ``num_bytes`` fit. Files in use count as if whole; others give way as needed, the oldest first."""
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
    """Of the whole, verified file."""
    part: Path
    """Of what there is of it until then."""
    handle: IO[bytes]
    """Of the part; it appends."""

    def close(self) -> None:
        self.handle.close()

    def fill(self, file: RemoteFile) -> None:
        """Fetch what is missing; what does not have the checksum is fetched once more, from the start."""
        found = wanted = ""
        for _ in range(2):
            found, wanted = self._append(file)
            if found == wanted:
                return
            _logger.warning("%s arrived with a wrong checksum", file.where)
            self.handle.truncate(0)
        raise DamagedInputError(
            f"{file.where} is damaged: it arrived twice with the checksum {found}, and should have {wanted}"
        )

    def _append(self, file: RemoteFile) -> tuple[str, str]:
        """Fetch the rest; the checksum found and the one wanted."""
        digest, wanted = _digest_of(file)
        if not file.version:  # nothing says that the rest belongs to what is there
            self.handle.truncate(0)
        present_bytes = 0
        self.handle.seek(0)
        while block := self.handle.read(_BLOCK_BYTES):
            present_bytes += len(block)
            digest.update(block)
        with contextlib.closing(remote_files.stream(file, present_bytes)) as chunks:
            for chunk in chunks:
                self._write(chunk)
                digest.update(chunk)
        return (digest.hexdigest() if wanted else ""), wanted

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            try:
                rest = rest[self.handle.write(rest) :]
            except OSError as error:
                raise write_error(self.part, error) from error


def _key(file: RemoteFile) -> str:
    """A hash that names the content, where possible the content alone, and the size that it is going to have."""
    identity = file.version if file.version.startswith(("sha256:", "blob:")) else f"{file.url} {file.version}"
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{file.size_bytes}"


def _digest_of(file: RemoteFile) -> tuple[Any, str]:
    """A digest to update, and what it must come to; empty where nobody knows."""
    kind, _, wanted = file.version.partition(":")
    if kind == "sha256":
        return hashlib.sha256(), wanted
    if kind == "blob":  # git's hash of a file
        return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False), wanted
    return _NoDigest(), ""


class _NoDigest:
    """Of a file whose checksum nobody knows."""

    def update(self, block: bytes) -> None:
        """Nothing."""


def _lock(handle: IO[bytes]) -> bool:
    """Whether the file is now this process's own."""
    try:
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_in_use(path: Path) -> bool:
    """Whether any process, this one too, has the file locked."""
    try:
        with path.open("rb") as handle:
            return not _lock(handle)
    except FileNotFoundError:
        return False
