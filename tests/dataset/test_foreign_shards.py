"""Shards of somebody else: no name leaves their folder, and every id beyond the vocabulary is named before a step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split, shard_parts
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from tests.support.shards import save_folder

TOKENS = [0, *range(1, 50)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two train shards and one val shard."""
    data = tmp_path / "data"
    data.mkdir()
    save_folder(data, {"train_000000.bin": TOKENS, "train_000001.bin": TOKENS, "val_000000.bin": TOKENS})
    return data


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, name: str) -> None:
    """Let the manifest name another file for its second shard."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["name"] = name
    rewrite(folder, shards=shards)


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/passwd", "a/../../outside.bin", "", ".", "..", "a\0b", "a//b"]
)
def test_training_refuses_the_names_that_verify_refuses(folder: Path, name: str) -> None:
    (folder.parent / "outside.bin").write_bytes((folder / "train_000001.bin").read_bytes())
    rename(folder, name)
    for read in (lambda: verify(folder), lambda: open_split(folder, "train")):
        with pytest.raises(UserError, match=r"manifest\.json is damaged \(shards\.1\.name: .*no name of a file"):
            read()


def poison(folder: Path, token: int, place: int) -> None:
    """An id in the second shard, whose sha256 is then put into the manifest: only its ids are wrong."""
    path = folder / "train_000001.bin"
    tokens = np.array(TOKENS)
    tokens[place] = token
    content = b"".join(map(bytes, shard_parts(tokens, vocab_size=2**16)))
    path.write_bytes(content)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["sha256"] = hashlib.sha256(content).hexdigest()
    rewrite(folder, shards=shards)


@pytest.mark.parametrize("token", [1000, 65535])
@pytest.mark.parametrize("place", [0, 17, 49])
def test_an_id_beyond_the_vocabulary_is_named_where_its_window_is_read(folder: Path, token: int, place: int) -> None:
    poison(folder, token, place)
    stream = open_split(folder, "train")
    assert stream.read(0, 50).tolist() == TOKENS
    for start, length in ((50 + place, 1), (0, 100), (40, 60)):
        with pytest.raises(
            UserError, match=rf"shard .*/train_000001\.bin holds the id {token:,} at token {place}, but ids are below"
        ):
            stream.read(start, length)


def test_the_largest_id_is_no_error(folder: Path) -> None:
    poison(folder, 999, 3)
    assert open_split(folder, "train").read(53, 1).tolist() == [999]
    assert stream_of_nothing(folder) == []


def stream_of_nothing(folder: Path) -> list[int]:
    return open_split(folder, "train").read(5, 0).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**15},
        {"vocab_size": -1},
        {"vocab_size": "many"},
        {"eot_id": 1000},
        {"eot_id": -1},
        {"shards": {}},
        {"shards": [1]},
        {"totals": []},
        {"inputs": 3},
        {"document_lengths": ["x"]},
        {"settings": [[]]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_right_is_one_sentence(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as caught:
        Manifest.load(folder)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"", b"[" * 100_000, b'{"format": 1, "x": ' + b"[" * 1000, b"\xff"]
)
def test_a_manifest_of_another_kind_is_one_sentence(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Manifest.load(folder)
