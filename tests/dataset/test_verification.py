"""Verification: a sentence for everything that differs from the manifest, on a disk and in a bucket."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from pipeline.dataset import verification
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, open_folder
from tests.support.shards import by_hand, save_folder


@pytest.fixture(params=["local", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An empty folder of each kind; copies of a bucket's shards go below ``tmp_path/cache``."""
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        (tmp_path / "data").mkdir()
        return open_folder(tmp_path / "data")
    return open_folder(request.getfixturevalue("s3").url + "/data")


def test_verification_names_everything_that_is_wrong(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_READ_BYTES", 8)  # four ids at a time
    names = [f"train_{index:06d}.bin" for index in range(9)]
    content = [0, 1, 2, 0, 4, 5, 6, 7, 8, 0, 10]
    manifest = save_folder(folder, dict.fromkeys(names, content) | {"val_000000.bin": [0]}, vocab_size=20)
    done: list[int] = []
    assert verify(folder, progress=done.append) == []
    assert done == [1] * 10
    folder.delete(names[1])
    folder.write(names[2], [by_hand(content)[:-2]])
    folder.write(names[3], [by_hand([*content[:-1], 11])])
    folder.write(names[4], [by_hand([*content[:-1], 20])])
    folder.write(names[5], [b"?" + by_hand(content)[1:]])
    folder.write(names[6], [by_hand([3, *content[1:]])])
    folder.write("train_000099.bin", [by_hand([0])])
    folder.write("items/leftover.bin", [b""])  # not a shard
    lied = dataclasses.replace(manifest.shards[8], documents=4)
    dataclasses.replace(manifest, shards=(*manifest.shards[:8], lied, *manifest.shards[8:])).save(folder)
    digest = manifest.shards[0].sha256[:16]

    def damaged(index: int, changed: list[int], first: bytes = b"") -> str:
        found = hashlib.sha256(first + by_hand(changed)[len(first) :]).hexdigest()[:16]
        return f"shard {folder}/{names[index]} is damaged: its sha256 is {found}..., the manifest says {digest}..."

    magic = int.from_bytes(b"?" + by_hand([0])[1:4], "little")
    for threads in (1, 8):
        assert verify(folder, num_threads=threads) == [
            f"shard {folder}/{names[1]} is missing",
            f"shard {folder}/{names[2]} has 1,044 bytes, but its 11 tokens take 1,046",
            damaged(3, [*content[:-1], 11]),
            damaged(4, [*content[:-1], 20]),
            f"shard {folder}/{names[4]} holds the id 20, but ids are below 20",
            f"{folder}/{names[5]} is no shard: it begins with the numbers {magic}, 1 in place of 20240520, 1 "
            "or 20240801, 7",
            damaged(5, content, b"?"),
            damaged(6, [3, *content[1:]]),
            f"shard {folder}/{names[6]} holds 2 documents, but the manifest says 3",
            f"shard {folder}/{names[6]} begins with the id 3, not with 0, as every document does",
            f"shard {folder}/{names[8]} holds 3 documents, but the manifest says 4",
            f"shard {folder}/{names[8]} is 2 times in the manifest",
            f"shard {folder}/train_000099.bin is not in the manifest",
        ]


def test_verification_needs_a_manifest(folder: Folder) -> None:
    with pytest.raises(
        UserError, match=r"is not finished: it has no manifest\.json; run jobs/tokenize.py with --output"
    ):
        verify(folder)


def test_wide_shards_are_verified(folder: Folder) -> None:
    save_folder(folder, {"train_000000.bin": [0, 70_000, 0]}, vocab_size=70_001)
    assert verify(folder) == []
    folder.write("train_000000.bin", [by_hand([0, 1, 2, 3, 4, 5])])  # as many bytes
    assert "has tokens of 2 bytes, but the manifest says 4" in verify(folder)[0]
