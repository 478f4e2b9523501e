"""Checkpoints found, verified and read: nothing is taken from one before all its files are what was written.

Verifying compares the size and the sha256 of every file with checkpoint.json, the ranks sharing the files. A checkpoint
in a bucket is fetched to each node once and verified on the way. torch.distributed.checkpoint then puts the parts
together, on any number of ranks; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints import integrity as checkpoint_integrity
from pipeline.checkpoints import metadata as checkpoint_metadata
from pipeline.checkpoints.metadata import (
    DESCRIPTION_FILE,
    CheckpointInfo,
    DamagedError,
    Description,
)
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder, open_folder
from pipeline.storage.node_copy import FileEntry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """A verified checkpoint on this node's disk."""

    name: str
    """Path or address, for messages."""
    info: CheckpointInfo
    path: Path
    """Where its files can be read."""


@contextlib.contextmanager
def open_newest(folder: Path | Folder, workers: ProcessGroup) -> Iterator[FoundCheckpoint | None]:
    """The newest sound checkpoint in ``<run>/checkpoints``, to be read within the block; None where there is none.

    A damaged one is put aside with a warning, and the one before it is looked at. Collective: every rank gets the same.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    folder, damage = as_folder(folder), ""
    while (step := _newest_step(folder, workers)) >= 0:
        place = checkpoint_directory.entry(folder, step)
        found = _open(place, workers)
        if isinstance(found, FoundCheckpoint):
            yield found
            if not isinstance(place, LocalFolder):  # a resumed run reads it once
                workers.broadcast_int(0)
                checkpoint_integrity.forget_copy(found.path)
            return
        damage = found
        workers.raise_on_all_ranks(_put_aside(folder, step, damage) if workers.is_rank_zero else None)
    if damage:
        raise UserError(
            f"no checkpoint in {folder} can be used, the oldest because its {damage}; put back a copy of one, or give "
            "another --output to begin anew"
        )
    yield None


def list_checkpoints(folder: Path | Folder) -> list[tuple[int, Folder]]:
    """(step, place) of the complete checkpoints in ``<run>/checkpoints``, oldest first."""
    folder = as_folder(folder)
    return [(step, checkpoint_directory.entry(folder, step)) for step in checkpoint_directory.list_steps(folder)]


def newest_info(folder: Path | Folder) -> tuple[Folder, CheckpointInfo] | None:
    """The newest checkpoint in ``<run>/checkpoints`` whose files are there with their sizes, and what it says.

    Reads no tensors, so that a job can say at once whether its run is done. None where there is no such checkpoint.
    """
    for _, place in reversed(list_checkpoints(folder)):
        with contextlib.suppress(DamagedError, FileNotFoundError):
            description = _read_description(place)
            if all(place.size(file.name) == file.num_bytes for file in description.files):
                return place, description.info
    return None


def find_checkpoint(path: Path | Folder) -> Folder:
    """``path`` itself if it is a checkpoint, else the newest checkpoint of the run folder ``path``."""
    place = as_folder(path)
    if place.size(DESCRIPTION_FILE) is not None:
        return place
    checkpoints = list_checkpoints(open_folder(f"{place}/checkpoints"))
    if not checkpoints:
        raise UserError(f"{place} is neither a checkpoint nor a run folder with one; train first, or give another")
    return checkpoints[-1][1]


def local_checkpoint(path: str | Path) -> Path:
    """The checkpoint, or the newest of the run folder, that ``path`` names, on this node's disk.

    One in a bucket is fetched, unless it is here already, and verified; the copy stays in the node's cache.
    """
    place = find_checkpoint(open_folder(path))
    if isinstance(place, LocalFolder):
        return place.path
    description = _sound_description(place)
    copy, findings = checkpoint_integrity.fetch(place, description)
    _refuse(place, description.files, findings)
    return copy


def read_info(path: Path) -> CheckpointInfo:
    """What the checkpoint at ``path`` says of itself."""
    return _sound_description(as_folder(path)).info


def read_versions(path: Path) -> dict[str, str]:
    """The versions of what wrote the checkpoint at ``path``."""
    return _sound_description(as_folder(path)).versions


def check_shape(place: Path | Folder | str, info: CheckpointInfo, expected: ModelConfig) -> None:
    """Raise a UserError that names the field where a checkpoint's model differs from the run's."""
    for name, value in expected.to_dict().items():
        if info.model.get(name) != value:
            raise UserError(
                f"checkpoint {place} holds a model with {name} {info.model.get(name)}, but this run asks for {value}; "
                f"use the same {name}, or another --output for a new run"
            )


def verify(path: Path) -> None:
    """Raise a UserError that names the file which is not what was written. Collective where there are several ranks."""
    place = LocalFolder(url=str(path))
    description = _sound_description(place)
    _refuse(place, description.files, checkpoint_integrity.look_at_all(place, description.files))


def load_training_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Verify the checkpoint at ``path``, then read ``state``'s tensors in place, each rank its part. Collective."""
    verify(path)
    read_tensors(path, state)


def load_weights(path: Path, model: Transformer) -> None:
    """Verify the checkpoint at ``path``, then read the weights alone into ``model``. Collective."""
    load_training_state(path, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})


def read_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Read ``state``'s tensors in place from a checkpoint that was verified, each rank its part. Collective."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp's warning: it is no mistake here
    try:
        dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException) as error:  # on every rank: dcp passes failures on
        raise UserError(f"checkpoint {path} cannot be read: {_root_cause(error)}") from error


def _newest_step(folder: Folder, workers: ProcessGroup) -> int:
    """As rank 0 sees it; -1 where there is none."""
    newest, error = -1, None
    if workers.is_rank_zero:
        try:
            newest = max(checkpoint_directory.list_steps(folder), default=-1)
        except UserError as caught:
            error = caught
    workers.raise_on_all_ranks(error)
    return workers.broadcast_int(newest)


def _open(place: Folder, workers: ProcessGroup) -> FoundCheckpoint | str:
    """The checkpoint, or which of its files is damaged in what way."""
    description, damage, error = None, "", None
    try:
        description = _read_description(place)
    except FileNotFoundError:
        damage = f"{DESCRIPTION_FILE} is missing"
    except DamagedError as caught:
        damage = f"{DESCRIPTION_FILE} {caught}"
    except UserError as caught:
        error = caught
    workers.raise_on_all_ranks(error)
    if workers.broadcast_int(int(bool(damage))):  # rank 0's word, so that all do the same
        return damage or f"{DESCRIPTION_FILE} is damaged"
    workers.raise_on_all_ranks(UserError(f"checkpoint {place}: its {damage}, on one worker only") if damage else None)
    assert description is not None
    if isinstance(place, LocalFolder):
        path, findings = place.path, checkpoint_integrity.look_at_all(place, description.files)
    else:
        path, findings = checkpoint_integrity.fetch_together(place, description)
    damage = checkpoint_integrity.first_damage(description.files, findings)
    return damage or FoundCheckpoint(name=str(place), info=description.info, path=path)


def _put_aside(folder: Folder, step: int, damage: str) -> UserError | None:
    try:
        where = checkpoint_directory.put_aside(folder, step)
    except UserError as error:
        return error
    logger.warning(
        "checkpoint %s is damaged: its %s; its files are now in %s, and the checkpoint before it is used",
        checkpoint_directory.entry(folder, step),
        damage,
        where,
    )
    return None


def _read_description(place: Folder) -> Description:
    """Raises FileNotFoundError, DamagedError, or UserError for what cannot be read or another version wrote."""
    return checkpoint_metadata.from_bytes(place.read(DESCRIPTION_FILE), str(place))


def _sound_description(place: Folder) -> Description:
    try:
        return _read_description(place)
    except FileNotFoundError:
        raise UserError(f"{place} is no checkpoint: it has no {DESCRIPTION_FILE}") from None
    except DamagedError as error:
        raise UserError(f"checkpoint {place} is damaged: its {DESCRIPTION_FILE} {error}; use an older one") from error


def _refuse(place: Folder, files: Sequence[FileEntry], findings: Sequence[int]) -> None:
    if damage := checkpoint_integrity.first_damage(files, findings):
        raise UserError(f"checkpoint {place} is damaged: its {damage}; use an older one")


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        return str(failure[0] if isinstance(failure, tuple) else failure)
    return str(error)
