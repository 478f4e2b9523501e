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


def make_documents(folder: Path, like: Path, shards: dict[str, list[int]]) -> Path:
    """Shards by name, each of documents of these lengths in tokens, their beginning counted; all texts differ."""
    folder.mkdir(parents=True)
    shutil.copy(like / TOKENIZER_NAME, folder)
    tokenizer = load_tokenizer(open_folder(like))
    text = Path(importlib.import_module("argparse").__file__ or "").read_text(encoding="utf-8")
    left = np.array(tokenizer.encode(text), dtype=np.uint16)
    entries = []
    for name, lengths in shards.items():
        tokens = np.empty(sum(lengths), dtype=np.uint16)
        starts = np.cumsum([0, *lengths[:-1]])
        is_start = np.zeros(len(tokens), dtype=bool)
        is_start[starts] = True
        tokens[is_start] = tokenizer.eot_id
        taken = len(tokens) - len(lengths)
        assert len(left) >= taken
        tokens[~is_start], left = left[:taken], left[taken:]
        sha256 = open_folder(folder).write(name, shard_parts(tokens, vocab_size=tokenizer.vocab_size))
        entries.append(
            ShardEntry(
                name=name,
                split=name.split("_", maxsplit=1)[0],
                tokens=len(tokens),
                documents=len(lengths),
                text_bytes=len(tokenizer.decode(tokens[~is_start].tolist()).encode()),
                sha256=sha256,
                source="argparse",
            )
        )
    dataclasses.replace(Manifest.load(like), shards=tuple(entries), inputs=({"name": "argparse"},)).save(folder)
    return folder
