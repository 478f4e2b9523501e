"""The files of a checkpoint are compared with checkpoint.json, on a disk or while a bucket's are fetched to this node.

The ranks share the reading, and every rank gets the same result, so that all of them use or reject a checkpoint.
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


def find_damage(directory: LocalFolder, files: Sequence[FileEntry]) -> str:
    """Which file is not what its entry says, and in what way; "" where all are sound.

    Every rank reads a share of the files and returns the same text. Collective where there are several ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    findings = [int(Finding.SOUND)] * len(files)

    def compare(index: int) -> None:
        findings[index] = node_copy.compare(directory, files[index])

    with _on_all_ranks(findings):
        in_threads(compare, range(rank, len(files), world_size), _AT_ONCE)
    return _first_damage(files, findings)


def fetch(origin: Folder, description: Description) -> tuple[Path, str]:
    """Copy a checkpoint in a bucket to this node, unless the node has a copy.

    Returns:
        The folder of the copy, and which file in the bucket is not what was written, as in ``find_damage``.
    """
    return _copy_path(origin, description), _first_damage(description.files, _fetch(origin, description))


def fetch_on_each_node(origin: Folder, description: Description) -> tuple[Path, str]:
    """``fetch`` on one rank of every node, with its result on all ranks. Collective where there are several ranks."""
    findings = [int(Finding.SOUND)] * len(description.files)
    with _on_all_ranks(findings):
        if _is_first_of_node():
            findings[:] = _fetch(origin, description)
    return _copy_path(origin, description), _first_damage(description.files, findings)


def remove_copy(path: Path) -> None:
    """Remove a fetched checkpoint after all ranks of this node have read it."""
    if _is_first_of_node():
        shutil.rmtree(path, ignore_errors=True)


def _fetch(origin: Folder, description: Description) -> list[int]:
    """A finding for each file in the bucket; there is a copy afterwards if all are sound."""
    copy = LocalFolder(url=str(_copy_path(origin, description)))
    copy.make()
    findings = [int(Finding.SOUND)] * len(description.files)
    with process_lock(copy.path.with_name(f"{copy.path.name}.lock")):
        try:
            node_copy.fetch(origin, copy, description.files, what="checkpoint files", flush="nothing")
            copy.write(DESCRIPTION_FILE, [description.content])
        except WrongFileError as error:
            findings[description.files.index(error.file)] = error.finding
            shutil.rmtree(copy.path)
    return findings


def _first_damage(files: Sequence[FileEntry], findings: Sequence[int]) -> str:
    both = zip(files, findings, strict=True)
    return next((f"{file.name} {Finding(finding).reason}" for file, finding in both if finding), "")


@contextlib.contextmanager
def _on_all_ranks(findings: list[int]) -> Iterator[None]:
    """After the block every rank has the largest of each finding; an error of one rank is raised on all of them."""
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


def _copy_path(origin: Folder, description: Description) -> Path:
    """A folder in the node's cache whose name depends on the checkpoint's address and content."""
    contents = json.dumps([str(origin), [[file.name, file.sha256] for file in description.files]])
    return node_cache("checkpoints") / hashlib.sha256(contents.encode()).hexdigest()[:20]


def _is_first_of_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
