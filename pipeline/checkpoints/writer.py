"""Writes the checkpoints of a run in the background, every rank its own part, and removes the oldest ones.

A checkpoint is complete or absent, whatever happens while it is written.

    <run>/checkpoints/step-000500/                     on a disk, or in a bucket
        shard-00001-model-00001-of-00023.safetensors   rank 0's part of the weights and optimizer state, in some files
        tokenizer.json                                 the tokenizer of the ids
        checkpoint.json                                step, settings, fingerprints, versions, sha256 of every file

Training waits while a rank copies its part (staging.py). The rest happens in a thread: torch.distributed.checkpoint
writes the copy as safetensors to the run folder or, for a bucket, to this node first; the files are hashed and
uploaded; rank 0 gathers the entries of all files, writes checkpoint.json last and gives the checkpoint its name. No
file is pickled.
Finding, verifying and reading checkpoints: reader.py.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from model.transformer import Transformer
from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints.metadata import DESCRIPTION_FILE, TOKENIZER_FILE, CheckpointInfo, to_bytes
from pipeline.checkpoints.reader import root_cause
from pipeline.checkpoints.staging import StagedState
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder, in_threads, node_cache, write_error
from pipeline.storage.node_copy import FileEntry, file_sha256

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # files
_READ_BYTES = 16 << 20


class CheckpointWriter:
    """Saves the checkpoints of one run, one at a time, in the background. All ranks call the same methods.

    Args:
        folder: ``<run>/checkpoints``, which every rank can reach.
        tokenizer_json: content of tokenizer.json, which is copied into every checkpoint.
        keep: number of newest checkpoints that are kept.
        keep_every: number of steps between checkpoints that are kept forever.
        also_keep: returns further steps to keep; called on rank 0, from a thread, whenever checkpoints are removed.
    """

    def __init__(
        self,
        folder: Path | Folder,
        workers: ProcessGroup,
        *,
        tokenizer_json: str,
        keep: int,
        keep_every: int | None = None,
        also_keep: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.folder = as_folder(folder)
        self.workers = workers
        self.tokenizer_json = tokenizer_json
        self.keep, self.keep_every, self.also_keep = keep, keep_every, also_keep
        self.stall_seconds = 0.0
        """Seconds that training waited for the last save."""
        self._held: set[int] = set()
        self._staged: StagedState | None = None
        self._touched: Future[None] | None = None
        self._pending: Future[None] | None = None
        # A new thread would use the first GPU.
        choose_device = partial(torch.cuda.set_device, workers.device) if workers.device.type == "cuda" else None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=choose_device)
        # Background collectives need a group of their own, or they would mix with the training step's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        shutil.rmtree(self._staging_folder(), ignore_errors=True)  # files of a process that was killed
        self.workers.raise_on_all_ranks(_error_of(self._prepare) if self.workers.is_rank_zero else None)

    def reserve(self, state: Mapping[str, Tensor]) -> None:
        """Allocate the memory for saving ``state`` in the background, before the first save needs it."""
        self._staged = StagedState(state)
        self._touched = self._background.submit(self._staged.touch)

    def save(self, state: Mapping[str, Tensor], info: CheckpointInfo) -> Folder:
        """Start a save; returns when the state is copied, so that training may change it. Collective.

        Returns:
            The folder of the checkpoint, which is complete some time later.

        Raises:
            UserError: the save before this one failed (a full disk, a lost folder).
        """
        start = time.perf_counter()
        self.wait()
        if self._staged is None or not self._staged.fits(state):
            self._staged = StagedState(state)
        elif self._touched is not None:
            self._touched.result()
        self._staged.copy(state)
        self._pending = self._background.submit(self._write, self._staged, info)
        self.stall_seconds = time.perf_counter() - start
        return self.path_of_step(info.step)

    def path_of_step(self, step: int) -> Folder:
        """The folder of the checkpoint of a step, whether it exists or not."""
        return checkpoint_directory.path_of_step(self.folder, step)

    def wait(self) -> None:
        """Wait until the last save is complete. Collective; raises a UserError on every rank where one failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self.workers.raise_on_all_ranks(_error_of(pending.result))

    def error(self) -> UserError | None:
        """The error of the last save on this rank, if it has failed already; never waits.

        Raises:
            Exception: an error in the background that is not a UserError.
        """
        pending = self._pending
        return _error_of(pending.result) if pending is not None and pending.done() else None

    def _prepare(self) -> None:
        self.folder.make()
        checkpoint_directory.remove_unfinished(self.folder)

    def _write(self, staged: StagedState, info: CheckpointInfo) -> None:
        """Write a checkpoint, in the background on every rank. A rank that fails raises, the others return."""
        first, step = self.workers.is_rank_zero, info.step
        error = _error_of(lambda: checkpoint_directory.begin(self.folder, step)) if first else None
        if self._gather(None if error else []) is None:
            if error:
                raise error
            return
        directory = checkpoint_directory.incomplete_path(self.folder, step)
        own: list[FileEntry] = []
        error = _error_of(lambda: own.extend(self._write_part(staged, directory)))
        files = self._gather(None if error else own)
        if first and files is None:
            checkpoint_directory.abort(self.folder, step)
        elif first and files is not None:
            self._complete(directory, files, info)
        if error:
            raise error

    def _write_part(self, staged: StagedState, directory: Folder) -> list[FileEntry]:
        """Write this rank's files to ``directory`` and return their entries. Collective, over gloo."""
        is_local = isinstance(directory, LocalFolder)
        folder = directory.path if isinstance(directory, LocalFolder) else self._staging_folder()
        entries: list[FileEntry] = []

        def hash_or_upload(path: Path) -> None:
            sha256 = file_sha256(path) if is_local else directory.write(path.name, _blocks(path))
            entries.append(FileEntry(name=path.name, num_bytes=path.stat().st_size, sha256=sha256))

        try:
            self._save_to(folder, staged)
            own = f"shard-{self.workers.rank + 1:05d}-*.safetensors"
            in_threads(hash_or_upload, sorted(folder.glob(own)), _AT_ONCE)
        finally:
            if not is_local:
                shutil.rmtree(folder, ignore_errors=True)
        return sorted(entries, key=lambda entry: entry.name)

    def _save_to(self, folder: Path, staged: StagedState) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=staged.file_of, save_distributed=True)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is intended here
        try:
            dcp.save(dict(staged.state), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:  # raised on every rank
            if isinstance(cause := root_cause(error), OSError):
                raise write_error(folder / "checkpoint", cause) from error
            raise UserError(f"the checkpoint in {folder} cannot be written: {cause}") from error

    def _staging_folder(self) -> Path:
        """Folder of this rank for files that are being uploaded to a bucket."""
        run = hashlib.sha256(self.folder.url.encode()).hexdigest()[:20]
        return node_cache("saving") / run / f"rank-{self.workers.rank}"

    def _gather(self, own: list[FileEntry] | None) -> list[FileEntry] | None:
        """The entries of all ranks, in the order of the ranks; None if any rank passes None. Collective, over gloo."""
        if self._group is None:
            return own
        gathered: list[list[FileEntry] | None] = [None] * self.workers.world_size
        dist.all_gather_object(gathered, own, group=self._group)
        if any(entries is None for entries in gathered):
            return None
        return [entry for entries in gathered if entries is not None for entry in entries]

    def _complete(self, directory: Folder, files: list[FileEntry], info: CheckpointInfo) -> None:
        tokenizer = self.tokenizer_json.encode()
        sha256 = directory.write(TOKENIZER_FILE, [tokenizer], flush="content")
        files = [*files, FileEntry(name=TOKENIZER_FILE, num_bytes=len(tokenizer), sha256=sha256)]
        directory.write(DESCRIPTION_FILE, [to_bytes(info, files)])
        checkpoint_directory.finish(self.folder, info.step)
        self._remove_old()

    def _remove_old(self) -> None:
        steps = checkpoint_directory.list_steps(self.folder)
        kept = {*steps[-self.keep :], *self.also_keep()}
        for step in steps:
            if step in kept or (self.keep_every is not None and step % self.keep_every == 0):
                continue
            if foreign := checkpoint_directory.foreign_files(self.folder, step):
                self._say_once(step, foreign)
            else:
                checkpoint_directory.remove(self.folder, step)

    def _say_once(self, step: int, foreign: list[str]) -> None:
        if step in self._held:
            return
        self._held.add(step)
        place = checkpoint_directory.path_of_step(self.folder, step)
        logger.warning("%s stays, because it holds what no save wrote: %s", place, ", ".join(foreign[:5]))


def training_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a resumed run needs, under the parameters' names: weights and optimizer state."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _error_of(action: Callable[[], object]) -> UserError | None:
    """Call ``action`` and return its error, if it is one that the user can mend."""
    try:
        action()
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"a checkpoint cannot be written: {error}")
    return None
