"""checkpoint.json: the description of a checkpoint, with the size and sha256 of each of its files.

It is written last and holds the sha256 of its own content beside those of the files, so that missing, cut off or
changed files are found before a tensor is read. Format version 1 has the sizes only.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from model.config import ModelConfig
from pipeline.errors import UserError
from pipeline.storage.json_files import FileName, WrongJsonError, parse_json
from pipeline.storage.node_copy import FileEntry
from pipeline.versions import commit

FORMAT_VERSION = 2
DESCRIPTION_FILE = "checkpoint.json"
TOKENIZER_FILE = "tokenizer.json"
_WHERE_GIVEN = {"eot_id", "sources", "phases", "chat_template"}
"""Fields that most checkpoints have no use for; they stay out of the file then, as in those of older versions."""
MOST_BYTES = 8 << 20  # some 150 for each of 24 files of every rank of the recipe


class DamagedError(Exception):
    """A checkpoint.json that is not what was written; the message goes on after the file's name, as in "is missing"."""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One of several folders of shards that a run mixes."""

    name: str
    """What it is called in metrics."""
    data: str
    """Path or address of the folder."""
    manifest_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Everything in a checkpoint except its tensors."""

    step: int
    """Optimizer steps completed."""
    tokens_seen: int
    """Training tokens processed."""
    first_loss: float
    """Training loss of the run's first step, nats per token."""
    last_loss: float
    """Training loss of the last step logged before the save."""
    model: dict[str, Any]
    """The fields of ModelConfig."""
    config: dict[str, Any]
    """The resolved settings of the run."""
    data: str
    """Path or address of the folder with the shards; of a mixture, the folders with their first weights."""
    manifest_fingerprint: str
    """sha256 of the manifest; of a mixture, that of the fingerprints of all."""
    tokenizer_fingerprint: str
    world_size: int
    """Number of ranks that wrote it."""
    skipped_steps: int = 0
    """Number of steps that were skipped because their loss or gradient was not finite (--skip_nonfinite)."""
    eot_id: int | None = None
    """Id of the token between documents; None: that of <|endoftext|>."""
    sources: tuple[SourceInfo, ...] = ()
    """The folders of a mixture; none where there is one folder."""
    phases: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of a mixture, the first step of each phase and the weight of each folder in whole numbers."""
    chat_template: str | None = None
    """Name of the template that the model chats in; None: it does not."""

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of checkpoint.json."""

    info: CheckpointInfo
    files: tuple[FileEntry, ...]
    versions: dict[str, str]
    """Versions of python and torch at its writing, and the commit of this project where it is known."""
    content: bytes
    """The bytes of the file."""


def to_bytes(info: CheckpointInfo, files: Sequence[FileEntry]) -> bytes:
    """The content of checkpoint.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if (revision := commit()) != "unknown":
        versions["commit"] = revision
    entries = {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files}
    known = {name: value for name, value in asdict(info).items() if name not in _WHERE_GIVEN or value not in (None, ())}
    values = {"format_version": FORMAT_VERSION, **known, "versions": versions, "files": entries}
    return (json.dumps({**values, "sha256": _checksum(values)}, indent=2) + "\n").encode()


def from_bytes(content: bytes, address: str) -> Description:
    """Parse the checkpoint.json of the checkpoint at ``address``.

    Raises:
        DamagedError: ``content`` is not what was written.
        UserError: another version of this project wrote it.
    """
    try:
        values = parse_json(content, dict[str, Any], most_bytes=MOST_BYTES)
    except WrongJsonError as error:
        raise DamagedError(f"cannot be read ({error})") from error
    checksum, version = values.pop("sha256", None), values.get("format_version")
    if checksum is not None and checksum != _checksum(values):
        raise DamagedError("has another content than was written (sha256)")
    if "format_version" not in values:
        raise DamagedError("has no format version")
    if version not in (1, FORMAT_VERSION):
        shown = repr(version)[:20]
        raise UserError(f"checkpoint {address} has format version {shown}; this program reads 1 to {FORMAT_VERSION}")
    if checksum is None and version != 1:
        raise DamagedError("has lost its own sha256")
    schema: type[_File1 | _File2] = _File2 if version == FORMAT_VERSION else _File1
    try:
        file = parse_json(content, schema, most_bytes=MOST_BYTES)
        # What does not make a network is no checkpoint either.
        info = CheckpointInfo(**{field.name: getattr(file, field.name) for field in fields(CheckpointInfo)})
        _ = info.model_config
    except (WrongJsonError, TypeError, ValueError) as error:
        raise DamagedError(f"lacks what belongs there ({error})") from error
    if not any(name.endswith(".safetensors") for name in file.files):
        raise DamagedError("names no file with tensors")
    files = tuple(_entry(name, value) for name, value in file.files.items())
    return Description(info=info, files=files, versions=file.versions, content=content)


def _checksum(values: Mapping[str, Any]) -> str:
    """sha256 of the values, which does not depend on the file's white space."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Size:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _File1(CheckpointInfo):
    """Format version 1. Fields with a default are newer than the format; older checkpoints do not have them."""

    files: dict[FileName, int]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _File2(CheckpointInfo):
    """Format version 2."""

    files: dict[FileName, _Size]
    versions: dict[str, str]


def _entry(name: str, value: int | _Size) -> FileEntry:
    if isinstance(value, int):
        return FileEntry(name=name, num_bytes=value, sha256=None)
    return FileEntry(name=name, num_bytes=value.bytes, sha256=value.sha256)
