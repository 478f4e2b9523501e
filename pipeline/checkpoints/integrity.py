"""A checkpoint's files against their description: looked at where they are, or fetched from a bucket to this node.

The ranks share the looking, and every rank hears the same findings, so that all of them take or refuse a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoints.metadata import DESCRIPTION_FILE, Description
from pipeline.errors import UserError
from pipeline.storage import node_copy
from pipeline.storage.folders import Folder, LocalFolder, in_threads, node_cache
from pipeline.storage.locks import process_lock
from pipeline.storage.node_copy import FileEntry, Finding, WrongFileError

_AT_ONCE = 4  # files


def first_damage(files: Sequence[FileEntry], findings: Sequence[int]) -> str:
    """The first damaged file and what is wrong with it; "" where all are sound."""
    both = zip(files, findings, strict=True)
    return next((f"{file.name} {Finding(finding).reason}" for file, finding in both if finding), "")


def look_at_all(place: LocalFolder, files: Sequence[FileEntry]) -> list[int]:
    """A finding for each file; every rank looks at its share and gets all. Collective where there are several ranks."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    findings = [int(Finding.SOUND)] * len(files)

    def look(index: int) -> None:
        findings[index] = node_copy.compare(place, files[index])

    with _shared(findings):
        in_threads(look, range(rank, len(files), world_size), _AT_ONCE)
    return findings


def fetch_together(place: Folder, description: Description) -> tuple[Path, list[int]]:
    """One rank of each node fetches. The folder of the copy and, on every rank, the findings about the origin.
    Collective where there are several ranks."""
    findings = [int(Finding.SOUND)] * len(description.files)
    with _shared(findings):
        if _is_first_of_node():
            _, findings[:] = fetch(place, description)
    return _copy_path(place, description), findings


def fetch(place: Folder, description: Description) -> tuple[Path, list[int]]:
    """Copy a checkpoint to this node, unless it is here; its path, and a finding for each file at its origin."""
    path = _copy_path(place, description)
    copy = LocalFolder(url=str(path))
    copy.make()
    findings = [int(Finding.SOUND)] * len(description.files)
    with process_lock(path.parent / f"{path.name}.lock"):
        try:
            node_copy.fetch(place, copy, description.files, what="checkpoint files", flush="nothing")
            copy.write(DESCRIPTION_FILE, [description.content])
        except WrongFileError as error:
            findings[description.files.index(error.file)] = error.finding
            shutil.rmtree(path)
    return path, findings


def forget_copy(path: Path) -> None:
    """Remove a fetched checkpoint that no rank of this node reads any more."""
    if _is_first_of_node():
        shutil.rmtree(path, ignore_errors=True)


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
