"""A checkpoint's files against their description: looked at where they are, or fetched from a bucket to this node.

The ranks share the looking, and every rank hears the same findings, so that all of them take or refuse a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoints.metadata import DESCRIPTION_FILE, Description, FileEntry
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, in_threads, node_cache
from pipeline.storage.locks import only_one_process

logger = logging.getLogger(__name__)

SOUND, MISSING, OTHER_SIZE, OTHER_CONTENT = range(4)
_REASONS = ("", "is missing", "has another size than was written", "has another content than was written (sha256)")
_AT_ONCE = 4  # files
_READ_BYTES = 16 << 20


def first_damage(files: Sequence[FileEntry], findings: Sequence[int]) -> str:
    """The first damaged file and what is wrong with it; "" where all are sound."""
    both = zip(files, findings, strict=True)
    return next((f"{file.name} {_REASONS[finding]}" for file, finding in both if finding != SOUND), "")


def look_at_all(place: LocalFolder, files: Sequence[FileEntry]) -> list[int]:
    """A finding for each file; every rank looks at its share and gets all. Collective where there are several ranks."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    findings = [SOUND] * len(files)

    def look(index: int) -> None:
        findings[index] = _look(place, files[index])

    with _shared(findings):
        in_threads(look, range(rank, len(files), world_size), _AT_ONCE)
    return findings


def fetch_together(place: Folder, description: Description) -> tuple[Path, list[int]]:
    """One rank of each node fetches. The folder of the copy and, on every rank, the findings about the origin.
    Collective where there are several ranks."""
    findings = [SOUND] * len(description.files)
    with _shared(findings):
        if _is_first_of_node():
            _, findings[:] = fetch(place, description)
    return _copy_path(place, description), findings


def fetch(place: Folder, description: Description) -> tuple[Path, list[int]]:
    """Copy a checkpoint to this node, unless it is here; its path, and a finding for each file at its origin."""
    path = _copy_path(place, description)
    copy = LocalFolder(url=str(path))
    copy.make()
    findings = [SOUND] * len(description.files)

    def fetch_file(index: int) -> None:
        file = description.files[index]
        if _look(copy, file) == SOUND:
            return
        try:
            copy.write(file.name, _verified(place, file), flush="nothing")
        except _DifferentError as error:
            findings[index] = error.finding

    with only_one_process(path.parent / f"{path.name}.lock"):
        copy.remove_leftovers()
        logger.info("fetching checkpoint %s to %s", place, path)
        in_threads(fetch_file, range(len(findings)), _AT_ONCE)
        if any(findings):
            shutil.rmtree(path)
        else:
            copy.write(DESCRIPTION_FILE, [description.content])
    return path, findings


def forget_copy(path: Path) -> None:
    """Remove a fetched checkpoint that no rank of this node reads any more."""
    if _is_first_of_node():
        shutil.rmtree(path, ignore_errors=True)


class _DifferentError(Exception):
    """A file in a bucket is not what was written."""

    def __init__(self, finding: int) -> None:
        super().__init__(_REASONS[finding])
        self.finding = finding


def _verified(place: Folder, file: FileEntry) -> Iterator[bytes]:
    """The content, range by range; raises at its end, before it gets its name, where it is not what it must be."""
    size = place.size(file.name)
    if size != file.num_bytes:
        raise _DifferentError(MISSING if size is None else OTHER_SIZE)
    digest = hashlib.sha256()
    for start in range(0, file.num_bytes, _READ_BYTES):
        part = place.read_range(file.name, start, min(start + _READ_BYTES, file.num_bytes))
        digest.update(part)
        yield part
    if file.sha256 not in (None, digest.hexdigest()):
        raise _DifferentError(OTHER_CONTENT)


def _look(place: LocalFolder, file: FileEntry) -> int:
    size = place.size(file.name)
    if size != file.num_bytes:
        return MISSING if size is None else OTHER_SIZE
    return SOUND if file.sha256 in (None, _sha256(place.path / file.name)) else OTHER_CONTENT


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _shared(findings: list[int]) -> Iterator[None]:
    """What the block writes to ``findings`` is known to every rank afterwards, the worst of each; so is an error."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    if dist.is_initialized():
        box = torch.tensor([*findings, int(error is not None)])
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        findings[:] = [int(finding) for finding in box[:-1]]
        if error is None and box[-1].item():
            error = UserError("another worker could not read the checkpoint; its message says why")
    if error is not None:
        raise error


def _copy_path(place: Folder, description: Description) -> Path:
    """Below the node's cache, a folder for these very contents."""
    contents = json.dumps([str(place), [[file.name, file.sha256] for file in description.files]])
    return node_cache("checkpoints") / hashlib.sha256(contents.encode()).hexdigest()[:20]


def _is_first_of_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
