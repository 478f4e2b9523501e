"""The manifest of a folder of shards: the content of every shard, its input, and the totals.

``manifest.json`` is written last, so a folder that has one is complete. Its bytes are a function of input, tokenizer
and settings alone; there is one line per shard, because 45 TB of text give some 700,000 of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, FailFast, Field

from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder
from pipeline.storage.json_files import FileName, WrongJsonError, parse_json

MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")
SPLIT_HASH = "xxh3_64"  # the hash of its text decides the split of a document: encode_documents.split_by_hash
IMPORTED = "imported"
"""The setting of shards that others cut, as jobs/import_shards.py takes them: one may begin inside a document."""
CHAT_TEMPLATE = "chat_template"
"""The setting of conversations packed into windows, as jobs/finetune.py writes them: the name of their template."""
BASE_TOKENIZER = "base_tokenizer"
"""Their setting that has the fingerprint of the tokenizer before the tokens of the chat were added."""
FLAGS = {"train": "train_flags", "val": "val_flags"}
"""Split -> the split of the shards that say, token by token, what it is in its conversation (dataset/packed.py)."""
_FORMAT = 1
_MOST_BYTES = 1 << 30  # some 350 a shard


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """The entry of one shard in the manifest."""

    name: FileName
    """File name in the manifest's folder."""
    split: str
    """train or val; of packed conversations train_flags or val_flags, too."""
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    sha256: str
    """sha256 of the whole file, hexadecimal."""
    source: str
    """Name of the input that the shard was made from."""
    headerless: bool = False
    """Whether the file is bare uint16 tokens, as jobs/import_shards.py may leave it."""
    learned_tokens: int = 0
    """Tokens of packed conversations that the loss counts; 0 where it counts all."""

    def to_dict(self) -> dict[str, Any]:
        """Its form in JSON; what came later only where it holds, so that other files on disk keep their bytes."""
        later = {"headerless", "learned_tokens"}
        return {name: value for name, value in vars(self).items() if name not in later or value}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a folder of shards. Its bytes depend on input, tokenizer and settings alone."""

    tokenizer_fingerprint: str
    vocab_size: int
    """All ids are smaller."""
    eot_id: int
    """The token that every document starts with; in imported shards it may end them instead."""
    settings: dict[str, Any]
    """The settings that the shards depend on, besides input and tokenizer."""
    inputs: Annotated[tuple[dict[str, Any], ...], FailFast()]
    """Name and version of everything that was read."""
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]
    """In reading order: train and val shards of work item 0, then of item 1, ...."""
    skipped: dict[str, int]
    """Reason -> documents that were left out."""
    damaged: Annotated[tuple[dict[str, str], ...], FailFast()] = ()
    """Name and reason of inputs of which something could not be read and was left out (--skip_bad_files)."""
    first_skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Reason -> a sentence about the first record that was left out because it holds no text (--skip_bad_records)."""
    ignored: Annotated[tuple[dict[str, Any], ...], FailFast()] = ()
    """Files that lay in the source and were not read: reason, number of files, an example."""
    document_lengths: Annotated[tuple[int, ...], FailFast()] = ()
    """How many documents have 2**i to 2**(i + 1) - 1 bytes; empty where they were not counted."""

    @classmethod
    def load(cls, folder: Folder | Path) -> Manifest:
        """Read ``folder/manifest.json``; raises UserError where it is absent or damaged."""
        folder = as_folder(folder)
        path = f"{folder}/{MANIFEST_NAME}"
        try:
            content = folder.read_range(MANIFEST_NAME, 0, _MOST_BYTES + 1)
            if parse_json(content, _Format, most_bytes=_MOST_BYTES).format != _FORMAT:
                raise UserError(f"{path} was written by another version of this project; tokenize again")
            file = parse_json(content, _ManifestFile, most_bytes=_MOST_BYTES)
        except FileNotFoundError:
            raise UserError(f"data folder {folder} {_why_unfinished(folder)}; {_mend(folder)}") from None
        except WrongJsonError as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run jobs/tokenize.py again") from error
        manifest = cls(**{field.name: getattr(file, field.name) for field in dataclasses.fields(cls)})
        if file.written_totals != manifest.totals():
            raise UserError(f"{path} is damaged: its totals are not those of its shards; {_mend(folder)}")
        if not 0 <= manifest.eot_id < manifest.vocab_size <= 2**32:
            raise UserError(
                f"{path} is damaged: it has {manifest.vocab_size:,} ids, and documents begin with the id "
                f"{manifest.eot_id:,}; {_mend(folder)}"
            )
        return manifest

    def save(self, folder: Folder | Path) -> None:
        """Write ``folder/manifest.json``, whole or not at all."""
        as_folder(folder).write(MANIFEST_NAME, [self.to_bytes()])

    def to_bytes(self) -> bytes:
        """The file's content: the same for the same manifest; what older ones lack only where it is not empty."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("ignored", "first_skipped"):
            if not values[name]:
                del values[name]
        values |= {
            "format": _FORMAT,
            "totals": self.totals(),
            "shards": [entry.to_dict() for entry in self.shards],
        }
        return ("{\n" + ",\n".join(f'"{name}": {_to_json(values[name])}' for name in sorted(values)) + "\n}\n").encode()

    def totals(self) -> dict[str, dict[str, int]]:
        """Tokens, documents and bytes of text of each split."""
        names = ("tokens", "documents", "text_bytes")
        return {split: {name: self._total(split, name) for name in names} for split in SPLITS}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the file's content, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def tokens(self, split: str) -> int:
        """Tokens of ``split`` ("train" or "val")."""
        return self._total(split, "tokens")

    def documents(self, split: str) -> int:
        """Documents of ``split``."""
        return self._total(split, "documents")

    def learned_tokens(self, split: str) -> int:
        """Tokens of the conversations of ``split`` that the loss counts."""
        return self._total(split, "learned_tokens")

    @property
    def chat_template(self) -> str | None:
        """Name of the template of packed conversations; None for documents."""
        return self.settings.get(CHAT_TEMPLATE)

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of ``split``."""
        return self._total(split, "text_bytes")

    def _total(self, split: str, name: str) -> int:
        return sum(getattr(entry, name) for entry in self.shards if entry.split == split)


@dataclass(frozen=True, kw_only=True)
class _Format:
    """What every version of the file has."""

    format: int


@dataclass(frozen=True, kw_only=True)
class _ManifestFile(Manifest):
    """The file's content, and nothing else: the fingerprint is that of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    written_totals: Annotated[dict[str, dict[str, int]], Field(alias="totals")]


def _to_json(value: Any) -> str:
    """JSON with one line per element of a list of objects."""
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(encode(entry) for entry in value) + "\n]"
    return encode(value)


def _why_unfinished(folder: Folder) -> str:
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        return "does not exist"
    return f"is not finished: it has no {MANIFEST_NAME}"


def _mend(folder: Folder) -> str:
    return f"run jobs/tokenize.py with --output {folder}"
