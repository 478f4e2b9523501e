"""Folders of shards with the tokenizer of another folder, to be mixed with it."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path

import numpy as np

from pipeline.dataset.dataset import TOKENIZER_NAME, load_tokenizer
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import shard_parts
from pipeline.storage.folders import open_folder


def make_source(folder: Path, like: Path, module: str, *, train_tokens: int, val_tokens: int = 300) -> Path:
    """A shard a split of the source text of a module, encoded with the tokenizer of the folder ``like``."""
    folder.mkdir(parents=True)
    shutil.copy(like / TOKENIZER_NAME, folder)
    tokenizer = load_tokenizer(open_folder(like))
    text = Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")
    tokens = np.array([tokenizer.eot_id, *tokenizer.encode(text)], dtype=np.uint16)
    assert len(tokens) >= train_tokens + val_tokens
    parts = {"train": tokens[:train_tokens], "val": np.append(tokens[:1], tokens[train_tokens:][: val_tokens - 1])}
    shards = tuple(
        ShardEntry(
            name=f"{split}_000000.bin",
            split=split,
            tokens=len(part),
            documents=1,
            text_bytes=len(tokenizer.decode(part[1:].tolist()).encode()),
            sha256=open_folder(folder).write(f"{split}_000000.bin", shard_parts(part, vocab_size=tokenizer.vocab_size)),
            source=module,
        )
        for split, part in parts.items()
        if len(part)
    )
    dataclasses.replace(Manifest.load(like), shards=shards, inputs=({"name": module},)).save(folder)
    return folder
