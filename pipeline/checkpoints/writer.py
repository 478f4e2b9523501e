"""Checkpoints of a run, written in the background: every rank its own part, complete or absent, the oldest removed.

    <run>/checkpoints/step-000500/                     on a disk, or in a bucket
        shard-00001-model-00001-of-00023.safetensors   rank 0's part of the weights and optimizer state, in some files
        tokenizer.json                                 what the ids mean
        checkpoint.json                                step, settings, fingerprints, versions, sha256 of every file

Training stands still while a rank copies its part (staging.py). The rest happens in a thread:
torch.distributed.checkpoint writes the copy as safetensors, every rank its own part, to the run's folder or, for a
bucket, to this node first; the files are hashed and uploaded; rank 0 hears of all, writes checkpoint.json last and
gives the checkpoint its name. No file is pickled. Finding, verifying and reading checkpoints: reader.py.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from model.transformer import Transformer
from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints.metadata import DESCRIPTION_FILE, TOKENIZER_FILE, CheckpointInfo, to_bytes
from pipeline.checkpoints.staging import StagedState
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder, in_threads, node_cache, write_error
from pipeline.storage.node_copy import FileEntry

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # files
_READ_BYTES = 16 << 20


def _none() -> Collection[int]:
    return ()


class CheckpointWriter:
    """Saves one run's checkpoints, one at a time, in the background. Every rank has one and calls the same methods.

    Args:
        folder: ``<run>/checkpoints``, seen by every rank.
        tokenizer_json: contents of tokenizer.json, copied into every checkpoint.
        keep: newest checkpoints that stay.
        keep_every: steps between checkpoints that stay for good.
        also_keep: asked on rank 0, from another thread, whenever checkpoints are removed: further steps that stay.
    """

    def __init__(
        self,
        folder: Path | Folder,
        workers: ProcessGroup,
        *,
        tokenizer_json: str,
        keep: int,
        keep_every: int | None = None,
        also_keep: Callable[[], Collection[int]] = _none,
    ) -> None:
        self.folder = as_folder(folder)
        self.workers = workers
        self.tokenizer_json = tokenizer_json
        self.keep, self.keep_every, self.also_keep = keep, keep_every, also_keep
        self.stall_seconds = 0.0
        """How long training stood still for the last save."""
        self._staged: StagedState | None = None
        self._touched: Future[None] | None = None
        self._pending: Future[None] | None = None
        self._background = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_choose_device, initargs=(workers.device,)
        )
        # Background collectives need a group of their own, or they would mix with the training step's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        shutil.rmtree(self._staging_folder(), ignore_errors=True)  # of a process that was killed
        self.workers.raise_on_all_ranks(_error_of(self._prepare) if self.workers.is_rank_zero else None)

    def reserve(self, state: Mapping[str, Tensor]) -> None:
        """Get the memory that saving ``state`` takes, in the background: the first save is then as short as any."""
        self._staged = StagedState(state)
        self._touched = self._background.submit(self._staged.touch)

    def save(self, state: Mapping[str, Tensor], info: CheckpointInfo) -> Folder:
        """Start writing; returns when the state is copied, so that training may change it. Collective.

        Returns:
            Where the checkpoint will be.

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
        return self.place(info.step)

    def place(self, step: int) -> Folder:
        """Where the checkpoint of a step is, or will be."""
        return checkpoint_directory.entry(self.folder, step)

    def wait(self) -> None:
        """Wait until the last save is complete. Collective; raises a UserError on every rank where one failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self.workers.raise_on_all_ranks(_error_of(pending.result))

    def error(self) -> UserError | None:
        """Why the last save failed on this rank, if that is known already; never waits.

        Raises:
            Exception: what no user can mend, as it was met in the background.
        """
        pending = self._pending
        return _error_of(pending.result) if pending is not None and pending.done() else None

    def _prepare(self) -> None:
        self.folder.make()
        checkpoint_directory.remove_unfinished(self.folder)

    def _write(self, staged: StagedState, info: CheckpointInfo) -> None:
        """In the background, on every rank. A rank that fails says so to the others and raises; they end quietly."""
        first, step = self.workers.is_rank_zero, info.step
        error = _error_of(lambda: checkpoint_directory.begin(self.folder, step)) if first else None
        if self._exchange(None if error else []) is None:
            return _raise(error)
        place = checkpoint_directory.building_place(self.folder, step)
        own: list[FileEntry] = []
        error = _error_of(lambda: own.extend(self._write_part(staged, place)))
        files = self._exchange(None if error else own)
        if first and files is None:
            checkpoint_directory.give_up(self.folder, step)
        elif first and files is not None:
            self._complete(place, files, info)
        _raise(error)

    def _write_part(self, staged: StagedState, place: Folder) -> list[FileEntry]:
        """This rank's files, written to ``place``. Collective, over gloo."""
        is_local = isinstance(place, LocalFolder)
        folder = place.path if isinstance(place, LocalFolder) else self._staging_folder()
        entries: list[FileEntry] = []

        def hash_or_upload(path: Path) -> None:
            sha256 = _sha256(path) if is_local else place.write(path.name, _blocks(path))
            entries.append(FileEntry(name=path.name, num_bytes=path.stat().st_size, sha256=sha256))

        try:
            self._save_to(folder, staged)
            in_threads(hash_or_upload, self._files_in(folder), _AT_ONCE)
        finally:
            if not is_local:
                shutil.rmtree(folder, ignore_errors=True)
        return sorted(entries, key=lambda entry: entry.name)

    def _save_to(self, folder: Path, staged: StagedState) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=staged.file_of, save_distributed=True)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no mistake here
        try:
            dcp.save(dict(staged.state), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:  # on every rank
            raise _explain(folder, error) from error

    def _files_in(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"shard-{self.workers.rank + 1:05d}-*.safetensors"))

    def _staging_folder(self) -> Path:
        """Of this rank, for files on their way to a bucket."""
        run = hashlib.sha256(self.folder.url.encode()).hexdigest()[:20]
        return node_cache("saving") / run / f"rank-{self.workers.rank}"

    def _exchange(self, own: list[FileEntry] | None) -> list[FileEntry] | None:
        """The entries of all ranks, in the order of the ranks; None where a rank gave None. Collective, over gloo."""
        if self._group is None:
            return own
        gathered: list[list[FileEntry] | None] = [None] * self.workers.world_size
        dist.all_gather_object(gathered, own, group=self._group)
        if any(entries is None for entries in gathered):
            return None
        return [entry for entries in gathered if entries is not None for entry in entries]

    def _complete(self, place: Folder, files: list[FileEntry], info: CheckpointInfo) -> None:
        tokenizer = self.tokenizer_json.encode()
        sha256 = place.write(TOKENIZER_FILE, [tokenizer], flush="content")
        files = [*files, FileEntry(name=TOKENIZER_FILE, num_bytes=len(tokenizer), sha256=sha256)]
        place.write(DESCRIPTION_FILE, [to_bytes(info, files)])
        checkpoint_directory.finish(self.folder, info.step)
        self._remove_old()

    def _remove_old(self) -> None:
        steps = checkpoint_directory.list_steps(self.folder)
        staying = {*steps[-self.keep :], *self.also_keep()}
        for step in steps:
            if step not in staying and (self.keep_every is None or step % self.keep_every):
                checkpoint_directory.remove(self.folder, step)


def training_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a resumed run needs, under the parameters' names: weights and both AdamW moments."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def _choose_device(device: torch.device) -> None:
    """A new thread is on the first GPU, whichever its process trains on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _explain(folder: Path, error: dcp.CheckpointException) -> UserError:
    """The first failure of any rank."""
    failure = next(iter(error.failures.values()))
    cause = failure[0] if isinstance(failure, tuple) else failure
    if isinstance(cause, OSError):
        return write_error(folder / "checkpoint", cause)
    return UserError(f"the checkpoint in {folder} cannot be written: {cause}")


def _error_of(action: Callable[[], object]) -> UserError | None:
    """Run ``action``; what a user can mend comes back."""
    try:
        action()
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"a checkpoint cannot be written: {error}")
    return None


def _raise(error: UserError | None) -> None:
    if error is not None:
        raise error
