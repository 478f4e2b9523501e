"""Copies a checkpoint into the folder of another run: by hard links on one disk, which take no room, else by bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints.metadata import DESCRIPTION_FILE
from pipeline.checkpoints.reader import read_description
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, in_threads

_READ_BYTES = 16 << 20
_AT_ONCE = 4  # files


def copy_checkpoint(source: Folder, checkpoints: Folder, step: int) -> None:
    """Copy the checkpoint ``source`` to the folder ``checkpoints`` as that of ``step``, whole or not at all.

    No file of a checkpoint is ever changed, so links are safe. Whoever reads the copy compares its sha256.

    Raises:
        UserError: ``source`` is no checkpoint, or lacks a file, or the copy cannot be written.
    """
    description = read_description(source)
    checkpoints.make()
    checkpoint_directory.begin(checkpoints, step)
    target = checkpoint_directory.incomplete_path(checkpoints, step)
    in_threads(lambda file: _copy(source, target, file.name, file.num_bytes), description.files, _AT_ONCE)
    target.write(DESCRIPTION_FILE, [description.content])
    checkpoint_directory.finish(checkpoints, step)


def _copy(source: Folder, target: Folder, name: str, num_bytes: int) -> None:
    if isinstance(source, LocalFolder) and isinstance(target, LocalFolder):
        try:
            os.link(source.path / name, target.path / name)
            return
        except OSError:  # another disk, or one without links
            pass
    try:
        target.write(name, _blocks(source, name, num_bytes), flush="content")
    except FileNotFoundError:
        raise UserError(f"checkpoint {source} is damaged: its {name} is missing; use another one") from None


def _blocks(source: Folder, name: str, num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, _READ_BYTES):
        yield source.read_range(name, start, min(start + _READ_BYTES, num_bytes))
