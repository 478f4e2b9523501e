"""Shards of a bucket on the disk of the node that trains: fetched once, whoever asks first, and verified on the way.

The copy is in ``shards-FINGERPRINT`` below the node's cache folder, so shards of another manifest are other files. It
stays: the next run on this node starts at once. Processes that start together wait for the one that fetches.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.folders import CACHE_VARIABLE, Folder, LocalFolder, in_threads, node_cache
from pipeline.storage.locks import only_one_process

_AT_ONCE = 8  # files; a connection gives some 50 MB/s
_RANGE_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WantedFile:
    """A file and what it must be."""

    name: str
    size_bytes: int
    sha256: str
    """Hexadecimal."""


def fetch(folder: Folder, fingerprint: str, files: Sequence[WantedFile]) -> Path:
    """Copy ``files`` of ``folder`` to this node, those that are not there yet; returns the folder of the copies.

    Raises UserError where a file is missing or differs from what it must be, or where the disk has no room.
    """
    copy = LocalFolder(url=str(node_cache(f"shards-{fingerprint[:20]}")))
    copy.make()
    with only_one_process(copy.path / ".lock"):
        copy.remove_leftovers()
        missing = [file for file in files if copy.size(file.name) != file.size_bytes]
        if missing:
            num_bytes = sum(file.size_bytes for file in missing)
            _require_room(folder, copy, num_bytes)
            logger.info("fetching %d shards, %.2f GB, from %s to %s", len(missing), num_bytes / 1e9, folder, copy)
            in_threads(lambda file: copy.write(file.name, _verified(folder, file)), missing, _AT_ONCE)
    return copy.path


def _verified(folder: Folder, file: WantedFile) -> Iterator[bytes]:
    """The content, range by range; raises UserError at its end where it is not what it must be."""
    digest = hashlib.sha256()
    for start in range(0, file.size_bytes, _RANGE_BYTES):
        stop = min(start + _RANGE_BYTES, file.size_bytes)
        try:
            part = folder.read_range(file.name, start, stop)
        except FileNotFoundError:
            raise UserError(f"shard {folder}/{file.name} is missing; run jobs/tokenize.py again") from None
        digest.update(part)
        yield part
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"shard {folder}/{file.name} is damaged: its sha256 is {digest.hexdigest()[:16]}..., the manifest says "
            f"{file.sha256[:16]}...; delete it and run jobs/tokenize.py again"
        )


def _require_room(folder: Folder, copy: LocalFolder, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(copy.path).free
    if free_bytes < num_bytes:
        raise UserError(
            f"the shards of {folder} take {num_bytes / 1e9:.2f} GB, but the disk of {copy} has "
            f"{free_bytes / 1e9:.2f} GB left; make room, or set {CACHE_VARIABLE} to a folder on another disk"
        )
