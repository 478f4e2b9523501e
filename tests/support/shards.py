"""Shards made from the description of their format, and folders of them with a manifest."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import (
    shard_parts,
)
from pipeline.storage.folders import Folder, open_folder


def by_hand(tokens: list[int], *, wide: bool = False) -> bytes:
    """The shard's bytes from the format's description."""
    header = struct.pack("<3i", *((20240801, 7) if wide else (20240520, 1)), len(tokens))
    return header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}{'I' if wide else 'H'}", *tokens)


def save_folder(folder: Folder | Path, shards: dict[str, list[int]], *, vocab_size: int = 1000) -> Manifest:
    """Shards and their manifest; 0 begins a document."""
    folder = open_folder(folder) if isinstance(folder, Path) else folder
    entries = [
        ShardEntry(
            name=name,
            split=name.split("_")[0],
            tokens=len(tokens),
            documents=tokens.count(0),
            text_bytes=7,
            sha256=folder.write(name, shard_parts(np.array(tokens), vocab_size=vocab_size)),
            source="x",
        )
        for name, tokens in shards.items()
    ]
    manifest = Manifest(
        tokenizer_fingerprint="f",
        vocab_size=vocab_size,
        eot_id=0,
        settings={"val_fraction": 0.1},
        inputs=({"name": "x"}, {"name": "żółw"}),
        shards=tuple(entries),
        skipped={"empty": 2},
        damaged=({"name": "y", "reason": "is damaged"},),
        document_lengths=(0, 1, 2),
    )
    manifest.save(folder)
    return manifest
