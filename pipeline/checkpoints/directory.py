"""The checkpoints of a run as entries of its folder, on a disk or in a bucket: begun, finished, listed, removed.

On a disk a checkpoint is built under a name that ends in .incomplete and renamed. A bucket has no renaming: there
checkpoint.json, written last, completes a checkpoint, and without it there is none. Of the ranks, one changes entries.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.checkpoints.metadata import DESCRIPTION_FILE
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, open_folder

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")
_INCOMPLETE = ".incomplete"
_DAMAGED = ".damaged"


def entry_name(step: int) -> str:
    return f"step-{step:06d}"


def entry(folder: Folder, step: int) -> Folder:
    """Where the checkpoint of a step is, or will be."""
    return open_folder(f"{folder}/{entry_name(step)}")


def list_steps(folder: Folder) -> list[int]:
    """Steps of the checkpoints in ``<run>/checkpoints``, oldest first: all that were completed, damaged or not."""
    if isinstance(folder, LocalFolder):
        found = [path.name for path in folder.path.glob("step-*") if path.is_dir()]
    else:
        suffix = f"/{DESCRIPTION_FILE}"
        found = [name.removesuffix(suffix) for name in folder.names("step-") if name.endswith(suffix)]
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, found) if match)


def begin(folder: Folder, step: int) -> None:
    """Make room for the files of a step's checkpoint; in a bucket, whatever was there is no checkpoint from now on."""
    if isinstance(folder, LocalFolder):
        with _disk_errors(folder):
            _remove_tree(_partial(folder, step))
            _partial(folder, step).mkdir(parents=True)
    else:
        remove(folder, step)


def building_place(folder: Folder, step: int) -> Folder:
    """Where the files of a begun checkpoint are written to."""
    return open_folder(_partial(folder, step)) if isinstance(folder, LocalFolder) else entry(folder, step)


def finish(folder: Folder, step: int) -> None:
    """All files are written, checkpoint.json as the last: give the checkpoint its name."""
    if not isinstance(folder, LocalFolder):
        return
    final = folder.path / entry_name(step)
    with _disk_errors(folder):
        before = final.with_name(f"{final.name}-before{_INCOMPLETE}")
        if final.exists():  # the same step again
            _remove_tree(before)
            final.rename(before)
        _partial(folder, step).rename(final)
        _sync(folder.path)
        _remove_tree(before)


def give_up(folder: Folder, step: int) -> None:
    """Remove the files of a checkpoint that cannot be finished."""
    if not isinstance(folder, LocalFolder):
        remove(folder, step)
    else:
        with _disk_errors(folder):
            _remove_tree(_partial(folder, step))


def remove(folder: Folder, step: int) -> None:
    """Remove a checkpoint; it is none any more before its first tensor is gone."""
    name = entry_name(step)
    if isinstance(folder, LocalFolder):
        doomed = folder.path / f"{name}-old{_INCOMPLETE}"
        with _disk_errors(folder):
            _remove_tree(doomed)
            (folder.path / name).rename(doomed)
            _remove_tree(doomed)
        return
    folder.delete(f"{name}/{DESCRIPTION_FILE}")
    for file in folder.names(f"{name}/"):
        folder.delete(file)


def put_aside(folder: Folder, step: int) -> str:
    """A damaged checkpoint is no checkpoint from now on; returns where its files are."""
    name = entry_name(step)
    if not isinstance(folder, LocalFolder):
        content = folder.read(f"{name}/{DESCRIPTION_FILE}")
        folder.write(f"{name}/{DESCRIPTION_FILE}{_DAMAGED}", [content])
        folder.delete(f"{name}/{DESCRIPTION_FILE}")
        return f"{folder}/{name}"
    aside = folder.path / f"{name}{_DAMAGED}"
    with _disk_errors(folder):
        _remove_tree(aside)  # of an earlier time
        (folder.path / name).rename(aside)
    return str(aside)


def remove_unfinished(folder: Folder) -> None:
    """Remove what interrupted saves and removals left."""
    if isinstance(folder, LocalFolder):
        with _disk_errors(folder):
            for leftover in folder.path.glob(f"step-*{_INCOMPLETE}"):
                logger.info("removing the unfinished checkpoint %s", leftover)
                _remove_tree(leftover)
        return
    files: dict[str, list[str]] = {}
    for name in folder.names("step-"):
        files.setdefault(name.partition("/")[0], []).append(name.partition("/")[2])
    for name, contents in files.items():
        if _STEP.fullmatch(name) and not any(file.startswith(DESCRIPTION_FILE) for file in contents):
            logger.info("removing the unfinished checkpoint %s/%s", folder, name)
            for file in contents:
                folder.delete(f"{name}/{file}")


def _partial(folder: LocalFolder, step: int) -> Path:
    return folder.path / f"{entry_name(step)}{_INCOMPLETE}"


def _remove_tree(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Make a rename outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(folder: LocalFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the checkpoints in {folder} cannot be changed: {reason} ({error.filename})") from error
