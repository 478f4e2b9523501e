"""Copies of a bucket's files on the disk of this node: fetched once, whoever asks first, and verified on the way.

A copy is in a folder of the node's cache that is named after its content, so other content has another folder. The
caller holds a lock (locks.py), so that processes that start together wait for the one that fetches.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.folders import CACHE_VARIABLE, Flush, Folder, LocalFolder, in_threads

_FILES_AT_ONCE = 8  # a connection gives some 50 MB/s
_RANGE_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file and what it must be."""

    name: str
    num_bytes: int
    sha256: str | None
    """Hexadecimal; None where the checksum is not known."""


class Finding(enum.IntEnum):
    """What a file is, compared with its entry; the larger, the later it was found."""

    SOUND = 0
    MISSING = 1
    OTHER_SIZE = 2
    OTHER_CONTENT = 3

    @property
    def reason(self) -> str:
        """The rest of a sentence that begins with the name of the file."""
        return _REASONS[self]


_REASONS = ("", "is missing", "has another size than was written", "has another content than was written (sha256)")


class WrongFileError(Exception):
    """A file is not what its entry says."""

    def __init__(self, file: FileEntry, finding: Finding, sha256: str = "") -> None:
        super().__init__(f"{file.name} {finding.reason}")
        self.file, self.finding = file, finding
        self.sha256 = sha256
        """The checksum that was found, hexadecimal, if the content is another."""


def fetch(
    folder: Folder,
    copy: LocalFolder,
    files: Sequence[FileEntry],
    *,
    what: str,
    trust_sizes: bool = False,
    flush: Flush = "name",
) -> None:
    """Copy those of ``files`` that ``copy`` does not have yet, each whole and verified or not at all.

    Args:
        folder: where the files come from.
        copy: a folder of the node's cache, locked by the caller.
        files: what the copy must hold afterwards.
        what: what the files are, for messages, such as "shards".
        trust_sizes: take a file of the right size in ``copy`` for sound, instead of reading all of it again.
        flush: as of ``Folder.write``.

    Raises:
        WrongFileError: a file of ``folder`` is missing, or is another one than its entry says.
        UserError: the disk has no room, or ``folder`` cannot be read.
    """
    copy.remove_leftovers()

    def is_there(file: FileEntry) -> bool:
        return copy.size(file.name) == file.num_bytes if trust_sizes else compare(copy, file) == Finding.SOUND

    found = in_threads(is_there, files, _FILES_AT_ONCE)
    missing = [file for file, present in zip(files, found, strict=True) if not present]
    if not missing:
        return
    num_bytes = sum(file.num_bytes for file in missing)
    free_bytes = shutil.disk_usage(copy.path).free
    if free_bytes < num_bytes:
        raise UserError(
            f"the {what} of {folder} take {num_bytes / 1e9:.2f} GB, but the disk of {copy} has "
            f"{free_bytes / 1e9:.2f} GB left; make room, or set {CACHE_VARIABLE} to a folder on another disk"
        )
    logger.info("fetching %d %s, %.2f GB, from %s to %s", len(missing), what, num_bytes / 1e9, folder, copy)
    in_threads(lambda file: copy.write(file.name, _verified(folder, file), flush=flush), missing, _FILES_AT_ONCE)


def compare(folder: LocalFolder, file: FileEntry) -> Finding:
    """Read a file on this node's disk from end to end and compare it with its entry."""
    size = folder.size(file.name)
    if size != file.num_bytes:
        return Finding.MISSING if size is None else Finding.OTHER_SIZE
    sound = file.sha256 in (None, file_sha256(folder.path / file.name))
    return Finding.SOUND if sound else Finding.OTHER_CONTENT


def _verified(folder: Folder, file: FileEntry) -> Iterator[bytes]:
    """The content, range by range; raises at its end, before it gets its name, where it is not what it must be."""
    size = folder.size(file.name)
    if size != file.num_bytes:
        raise WrongFileError(file, Finding.MISSING if size is None else Finding.OTHER_SIZE)
    digest = hashlib.sha256()
    for start in range(0, file.num_bytes, _RANGE_BYTES):
        try:
            part = folder.read_range(file.name, start, min(start + _RANGE_BYTES, file.num_bytes))
        except FileNotFoundError as error:
            raise WrongFileError(file, Finding.MISSING) from error
        digest.update(part)
        yield part
    if file.sha256 not in (None, digest.hexdigest()):
        raise WrongFileError(file, Finding.OTHER_CONTENT, digest.hexdigest())


def file_sha256(path: Path) -> str:
    """The checksum of a file on this node's disk, hexadecimal; UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
