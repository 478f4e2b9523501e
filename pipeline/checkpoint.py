"""Checkpoints of a run: sharded save, load, newest, prune.

    <run>/checkpoints/step-000500/
        shard-00001-model-00001-of-00001.safetensors   one file per rank: its part of the weights and optimizer state
        tokenizer.json                                 what the ids mean
        checkpoint.json                                step, settings, fingerprints, versions, file sizes

torch.distributed.checkpoint writes the safetensors files, each rank its own part, in a background thread; nothing in
them is pickled. A checkpoint is built under a name ending in .incomplete and renamed by rank 0 when every rank has
written, so it is complete or absent. Loading reshards: any number of ranks reads what any number wrote.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.parallel import Workers

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_COMPLETE = re.compile(r"^step-(\d{6,})$")
_INCOMPLETE = ".incomplete"
_DESCRIPTION = "checkpoint.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself (checkpoint.json)."""

    step: int
    """Optimizer steps done."""
    tokens_seen: int
    """Training tokens seen."""
    first_loss: float
    """Training loss of the run's first step, nats per token."""
    last_loss: float
    """Training loss of the last step logged before the save."""
    model: dict[str, Any]
    """ModelConfig's fields."""
    config: dict[str, Any]
    """The run's resolved settings."""
    data: str
    """Folder of the shards."""
    manifest_fingerprint: str
    tokenizer_fingerprint: str
    world_size: int
    """Ranks that wrote it."""

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model)


class CheckpointWriter:
    """Saves one run's checkpoints, one at a time, in the background.

    Args:
        folder: ``<run>/checkpoints``, seen by every rank.
        keep: newest checkpoints that stay.
        tokenizer_json: contents of tokenizer.json, copied into every checkpoint.
    """

    def __init__(self, folder: Path, workers: Workers, *, keep: int, tokenizer_json: str) -> None:
        self.folder = folder
        self.workers = workers
        self.keep = keep
        self.tokenizer_json = tokenizer_json
        _accept_one_process()
        self._pending: Future[Any] | None = None
        self._completer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Background collectives need a group of their own, or they would mix with the training step's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._on_first(lambda: _prepare(folder))

    def save(self, state: dict[str, Tensor], info: CheckpointInfo) -> Path:
        """Start writing; returns when the state is copied, so that training may change it. Collective.

        Raises:
            UserError: the save before this one failed (a full disk, a lost folder).
        """
        self.wait()
        final = self.folder / f"step-{info.step:06d}"
        partial = final.with_name(final.name + _INCOMPLETE)
        self._on_first(lambda: partial.mkdir(parents=True, exist_ok=True))
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        upload: Future[Any] = dcp.async_save(  # type: ignore[assignment]  # a plain future: no stager was given
            dict(state), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        if self.workers.is_first:  # its part of the save ends when every rank has written
            self._pending = self._completer.submit(self._complete, upload, partial, final, info)
        else:
            self._pending = upload
        return final

    def wait(self) -> None:
        """Wait until the last save is on disk under its final name. Collective."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self.workers.raise_together(_user_error_of(self.folder, pending.result))

    def _on_first(self, action: Callable[[], Any]) -> None:
        """Rank 0 acts; where it fails, every rank raises."""
        self.workers.raise_together(_user_error_of(self.folder, action) if self.workers.is_first else None)

    def _complete(self, upload: Future[Any], partial: Path, final: Path, info: CheckpointInfo) -> None:
        upload.result()
        (partial / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")
        _write_description(partial, info)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(self.folder)
        for _, old in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)


def training_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a resumed run needs, under the parameters' names: weights and both AdamW moments."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def load_training_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Read ``state``'s tensors in place, each rank its part. Collective where there are several ranks."""
    check_complete(path)
    _accept_one_process()
    reader = HuggingFaceStorageReader(str(path))
    no_dist = not dist.is_initialized()
    error = _user_error_of(path, lambda: dcp.load(dict(state), storage_reader=reader, no_dist=no_dist))
    if error is not None:  # on every rank: dcp passes failures on
        raise error


def load_weights(path: Path, model: Transformer) -> None:
    """Read the weights alone into ``model``."""
    load_training_state(path, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})


def read_info(path: Path) -> CheckpointInfo:
    """What the checkpoint at ``path`` says of itself."""
    return _info_from(_read_description(path))


def check_shape(path: Path, info: CheckpointInfo, expected: ModelConfig) -> None:
    """Raise a UserError that names the field where a checkpoint's model differs from the run's."""
    for name, value in expected.to_dict().items():
        if info.model.get(name) != value:
            raise UserError(
                f"checkpoint {path} holds a model with {name} {info.model.get(name)}, but this run asks for {value}; "
                f"use the same {name}, or another --output for a new run"
            )


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in ``<run>/checkpoints``, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_COMPLETE.match(entry.name), entry) for entry in folder.iterdir())
    return sorted((int(match[1]), entry) for match, entry in found if match and (entry / _DESCRIPTION).is_file())


def find_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a checkpoint, else the newest checkpoint of the run folder ``path``."""
    if (path / _DESCRIPTION).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UserError(f"{path} is neither a checkpoint nor a run folder with one; train first, or give another")
    return checkpoints[-1][1]


def check_complete(path: Path) -> None:
    """Raise a UserError that names the file which is missing or has another size than was written."""
    for name, size in _read_description(path)["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(
                f"checkpoint {path} is damaged: {name} is missing or truncated; delete it to use an older one"
            )


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step-*{_INCOMPLETE}"):
        logger.info("removing the unfinished checkpoint %s", leftover)
        shutil.rmtree(leftover)


def _write_description(partial: Path, info: CheckpointInfo) -> None:
    files = {entry.name: entry.stat().st_size for entry in sorted(partial.iterdir())}
    versions = {"python": platform.python_version(), "torch": torch.__version__, **_commit()}
    description = {"format_version": FORMAT_VERSION, **asdict(info), "versions": versions, "files": files}
    with (partial / _DESCRIPTION).open("w", encoding="utf-8") as file:
        json.dump(description, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


@functools.lru_cache(maxsize=1)
def _commit() -> dict[str, str]:
    """The commit of this project's checkout; empty where there is none, as in a job's copy on a cluster."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    return {"commit": answer.stdout.strip()} if answer.returncode == 0 else {}


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is no checkpoint: it has no {_DESCRIPTION}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged: {_DESCRIPTION} cannot be read ({error})") from error
    if description.get("format_version") != FORMAT_VERSION:
        version = description.get("format_version")
        raise UserError(f"checkpoint {path} has format version {version}; this program reads {FORMAT_VERSION}")
    return description


def _info_from(description: Mapping[str, Any]) -> CheckpointInfo:
    return CheckpointInfo(**{field.name: description[field.name] for field in fields(CheckpointInfo)})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _accept_one_process() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp's warning: it is no mistake here


def _user_error_of(folder: Path, action: Callable[[], Any]) -> UserError | None:
    """Run ``action``; a failure to read or write comes back as one sentence that names the folder."""
    try:
        action()
    except (OSError, dcp.CheckpointException) as error:
        return UserError(f"checkpoint files in {folder} cannot be written or read: {_root_cause(error)}")
    return None


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        return str(failure[0] if isinstance(failure, tuple) else failure)
    return str(error)
