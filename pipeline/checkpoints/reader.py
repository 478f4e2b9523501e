"""Finds, verifies and reads checkpoints. No tensor is read before all files have been found to be what was written.

Verifying compares the size and the sha256 of every file with checkpoint.json; the ranks share the files. A checkpoint
in a bucket is fetched to each node once and verified on the way. torch.distributed.checkpoint then reads the tensors on
any number of ranks; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints import integrity as checkpoint_integrity
from pipeline.checkpoints import metadata as checkpoint_metadata
from pipeline.checkpoints.metadata import DESCRIPTION_FILE, CheckpointInfo, DamagedError, Description
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder, open_folder
from pipeline.storage.node_copy import Finding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """A verified checkpoint on this node's disk."""

    name: str
    """Path or address, for messages."""
    info: CheckpointInfo
    path: Path
    """Folder of its files on this node."""


@contextlib.contextmanager
def open_newest(folder: Path | Folder, workers: ProcessGroup) -> Iterator[FoundCheckpoint | None]:
    """The newest sound checkpoint in ``<run>/checkpoints``, readable within the block; None where there is none.

    A damaged one is renamed with a warning, and the one before it is tried. Collective; every rank gets the same one.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    folder, damage = as_folder(folder), ""
    while (step := _newest_step(folder, workers)) >= 0:
        directory = checkpoint_directory.path_of_step(folder, step)
        checkpoint, damage = _open(directory, workers)
        if checkpoint is not None:
            yield checkpoint
            if not isinstance(directory, LocalFolder):  # a resumed run reads it once
                workers.broadcast_int(0)
                checkpoint_integrity.remove_copy(checkpoint.path)
            return
        workers.raise_on_all_ranks(_quarantine(folder, step, damage) if workers.is_rank_zero else None)
    if damage:
        raise UserError(
            f"no checkpoint in {folder} can be used, the oldest because its {damage}; put back a copy of one, or give "
            "another --output to begin anew"
        )
    yield None


def list_checkpoints(folder: Path | Folder) -> list[tuple[int, Folder]]:
    """Step and folder of each complete checkpoint in ``<run>/checkpoints``, oldest first."""
    folder = as_folder(folder)
    return [(step, checkpoint_directory.path_of_step(folder, step)) for step in checkpoint_directory.list_steps(folder)]


def newest_info(folder: Path | Folder) -> tuple[Folder, CheckpointInfo] | None:
    """Folder and description of the newest checkpoint in ``<run>/checkpoints`` whose files have the right sizes.

    Reads no tensors, so that a job can say at once whether its run is done. None where there is no such checkpoint.
    """
    for _, directory in reversed(list_checkpoints(folder)):
        with contextlib.suppress(DamagedError, FileNotFoundError):
            description = _read_description(directory)
            if all(directory.size(file.name) == file.num_bytes for file in description.files):
                return directory, description.info
    return None


def find_checkpoint(path: Path | Folder) -> Folder:
    """``path`` itself if it is a checkpoint, else the newest checkpoint of the run folder ``path``."""
    directory = as_folder(path)
    if directory.size(DESCRIPTION_FILE) is not None:
        return directory
    checkpoints = list_checkpoints(open_folder(f"{directory}/checkpoints"))
    if not checkpoints:
        raise UserError(f"{directory} is neither a checkpoint nor a run folder with one; train first, or give another")
    return checkpoints[-1][1]


def local_checkpoint(path: str | Path) -> Path:
    """The checkpoint ``path``, or the newest one of the run folder ``path``, on this node's disk.

    One in a bucket is fetched, unless the node has a copy, and verified; the copy stays in the node's cache.
    """
    directory = find_checkpoint(open_folder(path))
    if isinstance(directory, LocalFolder):
        return directory.path
    copy, damage = checkpoint_integrity.fetch(directory, read_description(directory))
    if damage:
        raise UserError(_damaged(directory, damage))
    return copy


def read_info(path: Path) -> CheckpointInfo:
    """Step, settings and fingerprints of the checkpoint at ``path``."""
    return read_description(as_folder(path)).info


def read_description(directory: Folder) -> Description:
    """Read checkpoint.json; every failure is a UserError."""
    try:
        return _read_description(directory)
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint: it has no {DESCRIPTION_FILE}") from None
    except DamagedError as error:
        raise UserError(_damaged(directory, f"{DESCRIPTION_FILE} {error}")) from error


def check_shape(name: str, model: Mapping[str, Any], expected: ModelConfig, *, otherwise: str) -> None:
    """Raise a UserError that names the first setting in which the run's model differs from that of ``name``.

    ``model`` holds the fields of its ModelConfig; ``otherwise`` says what to do for another shape.
    """
    for key, value in expected.to_dict().items():
        if model.get(key) != value:
            raise UserError(
                f"{name} holds a model with {key} {model.get(key)}, but this run asks for {value}; use the same {key}, "
                f"or {otherwise}"
            )


def verify(path: Path) -> None:
    """Raise a UserError that names the first file that is not what was written. Collective with several ranks."""
    directory = LocalFolder(url=str(path))
    if damage := checkpoint_integrity.find_damage(directory, read_description(directory).files):
        raise UserError(_damaged(directory, damage))


def load_training_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Verify the checkpoint at ``path``, then read ``state``'s tensors in place, each rank its part. Collective."""
    verify(path)
    read_tensors(path, state)


def load_weights(path: Path, model: Transformer) -> None:
    """Verify the checkpoint at ``path``, then read the weights alone into ``model``. Collective."""
    load_training_state(path, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})


def read_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Read ``state``'s tensors in place from a checkpoint that was verified, each rank its part. Collective."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of dcp; it is intended here
    storage = _storage(path, read_description(as_folder(path)))
    try:
        dcp.load(dict(state), storage_reader=storage, no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException) as error:  # raised on every rank
        raise UserError(f"checkpoint {path} cannot be read: {root_cause(error)}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of the checkpoint at ``path``, by the headers of its files.

    Raises:
        UserError: a file has another size, a header is damaged, or a part of a tensor is missing or is there twice.
    """
    directory = as_folder(path)
    description = read_description(directory)
    for file in description.files:
        if (size := directory.size(file.name)) != file.num_bytes:
            finding = Finding.MISSING if size is None else Finding.OTHER_SIZE
            raise UserError(_damaged(directory, f"{file.name} {finding.reason}"))
    try:
        found = _storage(path, description).read_metadata().state_dict_metadata
        tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}
        shapes = {name: tuple(tensor.size) for name, tensor in tensors.items()}
        parts = {name: sum(chunk.sizes.numel() for chunk in tensor.chunks) for name, tensor in tensors.items()}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    for name, shape in shapes.items():
        if parts[name] != math.prod(shape):
            raise UserError(f"checkpoint {path} does not hold all of the tensor {name}, or some of it twice")
    return shapes


class _ListedFiles(FileSystem):
    """A folder in which torch.distributed.checkpoint sees the files that checkpoint.json names, and no others.

    It takes the tensors of every safetensors file that it sees, so a file that was put beside would replace weights.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [os.path.join(path, name) for name in self.names]  # noqa: PTH118


def _storage(path: Path, description: Description) -> HuggingFaceStorageReader:
    storage = HuggingFaceStorageReader(str(path))
    storage.fs = _ListedFiles([file.name for file in description.files])
    return storage


def _newest_step(folder: Folder, workers: ProcessGroup) -> int:
    """The newest step in ``folder``, as rank 0 sees it, on every rank; -1 where there is none. Collective."""
    newest, error = -1, None
    if workers.is_rank_zero:
        try:
            newest = max(checkpoint_directory.list_steps(folder), default=-1)
        except UserError as caught:
            error = caught
    workers.raise_on_all_ranks(error)
    return workers.broadcast_int(newest)


def _open(directory: Folder, workers: ProcessGroup) -> tuple[FoundCheckpoint | None, str]:
    """The checkpoint if it is sound, and otherwise which of its files is damaged in what way. Collective."""
    description, damage, error = None, "", None
    try:
        description = _read_description(directory)
    except FileNotFoundError:
        damage = f"{DESCRIPTION_FILE} is missing"
    except DamagedError as caught:
        damage = f"{DESCRIPTION_FILE} {caught}"
    except UserError as caught:
        error = caught
    workers.raise_on_all_ranks(error)
    if workers.broadcast_int(int(bool(damage))):  # rank 0 decides, so that all ranks do the same
        return None, damage or f"{DESCRIPTION_FILE} is damaged"
    workers.raise_on_all_ranks(
        UserError(f"checkpoint {directory}: its {damage}, on one worker only") if damage else None
    )
    assert description is not None
    if isinstance(directory, LocalFolder):
        path, damage = directory.path, checkpoint_integrity.find_damage(directory, description.files)
    else:
        path, damage = checkpoint_integrity.fetch_on_each_node(directory, description)
    if damage:
        return None, damage
    return FoundCheckpoint(name=str(directory), info=description.info, path=path), ""


def _quarantine(folder: Folder, step: int, damage: str) -> UserError | None:
    try:
        new_path = checkpoint_directory.quarantine(folder, step)
    except UserError as error:
        return error
    logger.warning(
        "checkpoint %s is damaged: its %s; its files are now in %s, and the checkpoint before it is used",
        checkpoint_directory.path_of_step(folder, step),
        damage,
        new_path,
    )
    return None


def _read_description(directory: Folder) -> Description:
    """Read checkpoint.json; errors as in ``from_bytes``, and FileNotFoundError where there is none."""
    content = directory.read_range(DESCRIPTION_FILE, 0, checkpoint_metadata.MOST_BYTES + 1)
    return checkpoint_metadata.from_bytes(content, str(directory))


def _damaged(directory: Folder, damage: str) -> str:
    return f"checkpoint {directory} is damaged: its {damage}; use an older one"


def root_cause(error: BaseException) -> BaseException:
    """The first failure of any rank behind an error of torch.distributed.checkpoint; any other error as it is."""
    failures = error.failures if isinstance(error, dcp.CheckpointException) else {}
    failure = next(iter(failures.values()), error)
    return failure[0] if isinstance(failure, tuple) else failure
