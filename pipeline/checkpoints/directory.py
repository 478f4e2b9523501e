"""The folder <run>/checkpoints, on a disk or in a bucket: checkpoints are begun, finished, listed and removed in it.

On a disk a checkpoint is written under a name that ends in .incomplete, and then renamed. Objects in a bucket cannot be
renamed: there checkpoint.json, written last, makes a checkpoint complete, and files without it are no checkpoint. Only
one rank calls the functions that change the folder.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.checkpoints.metadata import DESCRIPTION_FILE, TOKENIZER_FILE
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, open_folder, sync_folder

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")
_INCOMPLETE = ".incomplete"
_DAMAGED = ".damaged"
_LEFTOVER = re.compile(rf"step-\d{{6,}}(-old|-before)?{re.escape(_INCOMPLETE)}")
_WRITTEN = re.compile(rf"({DESCRIPTION_FILE}|{TOKENIZER_FILE}|shard-\d+-.*\.safetensors|\.tmp-.*)(\.damaged)?")


def step_name(step: int) -> str:
    """Name of the checkpoint of a step in its folder."""
    return f"step-{step:06d}"


def path_of_step(folder: Folder, step: int) -> Folder:
    """The checkpoint of a step, whether it exists or not."""
    return open_folder(f"{folder}/{step_name(step)}")


def list_steps(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints in ``<run>/checkpoints``, damaged ones included, oldest first."""
    if isinstance(folder, LocalFolder):
        names = [path.name for path in folder.path.glob("step-*") if path.is_dir()]
    else:
        suffix = f"/{DESCRIPTION_FILE}"
        names = [name.removesuffix(suffix) for name in folder.names("step-") if name.endswith(suffix)]
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def begin(folder: Folder, step: int) -> None:
    """Prepare an empty folder for a checkpoint's files. In a bucket this removes an older checkpoint of the step."""
    abort(folder, step)
    if isinstance(folder, LocalFolder):
        with _disk_errors(folder):
            _partial(folder, step).mkdir(parents=True)


def incomplete_path(folder: Folder, step: int) -> Folder:
    """The folder that the files of a checkpoint are written to until ``finish``."""
    return open_folder(_partial(folder, step)) if isinstance(folder, LocalFolder) else path_of_step(folder, step)


def finish(folder: Folder, step: int) -> None:
    """Give a checkpoint its name after all files were written, checkpoint.json as the last one."""
    if not isinstance(folder, LocalFolder):
        return
    final = folder.path / step_name(step)
    with _disk_errors(folder):
        before = final.with_name(f"{final.name}-before{_INCOMPLETE}")
        if final.exists():  # the same step again
            _remove_tree(before)
            final.rename(before)
        _partial(folder, step).rename(final)
        if before.exists():
            for name in _foreign(before):
                (before / name).rename(final / name)
        sync_folder(folder.path)
        _remove_tree(before)


def abort(folder: Folder, step: int) -> None:
    """Remove the files of a checkpoint that cannot be finished."""
    if not isinstance(folder, LocalFolder):
        remove(folder, step)
    else:
        with _disk_errors(folder):
            _remove_tree(_partial(folder, step))


def foreign_files(folder: Folder, step: int) -> list[str]:
    """What lies in a checkpoint and no save has written: names of files and folders, sorted."""
    if isinstance(folder, LocalFolder):
        with _disk_errors(folder):
            return _foreign(folder.path / step_name(step))
    prefix = f"{step_name(step)}/"
    names = {name.removeprefix(prefix).partition("/")[0] for name in folder.names(prefix)}
    return sorted(name for name in names if not _WRITTEN.fullmatch(name))


def remove(folder: Folder, step: int) -> None:
    """Remove a checkpoint, in such an order that a removal cut short does not leave a damaged one.

    The caller has seen that it holds no foreign files.
    """
    name = step_name(step)
    if isinstance(folder, LocalFolder):
        doomed = folder.path / f"{name}-old{_INCOMPLETE}"
        with _disk_errors(folder):
            _remove_tree(doomed)
            (folder.path / name).rename(doomed)
            _remove_tree(doomed)
        return
    folder.delete(f"{name}/{DESCRIPTION_FILE}")
    for file in folder.names(f"{name}/"):
        if _WRITTEN.fullmatch(file.partition("/")[2]):
            folder.delete(file)


def quarantine(folder: Folder, step: int) -> str:
    """Rename a damaged checkpoint, so that it is not found any more; returns the new address of its files."""
    name = step_name(step)
    if not isinstance(folder, LocalFolder):
        content = folder.read(f"{name}/{DESCRIPTION_FILE}")
        folder.write(f"{name}/{DESCRIPTION_FILE}{_DAMAGED}", [content])
        folder.delete(f"{name}/{DESCRIPTION_FILE}")
        return f"{folder}/{name}"
    damaged = folder.path / f"{name}{_DAMAGED}"
    with _disk_errors(folder):
        if damaged.exists():  # from an earlier time
            numbers = itertools.count(2)
            damaged.rename(next(path for n in numbers if not (path := Path(f"{damaged}-{n}")).exists()))
        (folder.path / name).rename(damaged)
    return str(damaged)


def remove_unfinished(folder: Folder) -> None:
    """Remove the files that interrupted saves and removals left."""
    if isinstance(folder, LocalFolder):
        with _disk_errors(folder):
            for leftover in folder.path.glob(f"step-*{_INCOMPLETE}"):
                if not _LEFTOVER.fullmatch(leftover.name):
                    continue
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
    return folder.path / f"{step_name(step)}{_INCOMPLETE}"


def _foreign(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if not _WRITTEN.fullmatch(file.name) or file.is_dir())


def _remove_tree(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def _disk_errors(folder: LocalFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the checkpoints in {folder} cannot be changed: {reason} ({error.filename})") from error
