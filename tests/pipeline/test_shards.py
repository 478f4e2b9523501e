"""Shards, manifest and token stream against bytes put together by hand, and against damage of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.shards import (
    Manifest,
    ShardEntry,
    TokenStream,
    open_files,
    open_shard,
    open_split,
    token_dtype,
    verify,
    write_atomically,
    write_shard,
)


def by_hand(tokens: list[int], *, wide: bool = False) -> bytes:
    """The shard's bytes from the format's description."""
    header = struct.pack("<3i", *((20240801, 7) if wide else (20240520, 1)), len(tokens))
    return header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}{'I' if wide else 'H'}", *tokens)


def save_folder(folder: Path, shards: dict[str, list[int]], *, vocab_size: int = 1000) -> Manifest:
    entries = []
    for name, tokens in shards.items():
        digest = write_shard(folder / name, np.array(tokens), vocab_size=vocab_size)
        entry = ShardEntry(
            name=name,
            split=name.split("_")[0],
            tokens=len(tokens),
            documents=1,
            text_bytes=7,
            sha256=digest,
            source="x",
        )
        entries.append(entry)
    manifest = Manifest(
        tokenizer_fingerprint="f",
        vocab_size=vocab_size,
        eot_id=0,
        settings={"val_fraction": 0.1},
        inputs=({"name": "x"},),
        shards=tuple(entries),
        skipped={"empty": 2},
    )
    manifest.save(folder)
    return manifest


@pytest.mark.parametrize(("vocab_size", "wide"), [(65536, False), (65537, True)])
def test_bytes_are_those_of_the_format(tmp_path: Path, vocab_size: int, wide: bool) -> None:
    tokens = [0, 1, 65535, 3]
    digest = write_shard(tmp_path / "a.bin", np.array(tokens), vocab_size=vocab_size)
    assert (tmp_path / "a.bin").read_bytes() == by_hand(tokens, wide=wide)
    assert digest == hashlib.sha256(by_hand(tokens, wide=wide)).hexdigest()
    shard = open_shard(tmp_path / "a.bin")
    assert shard.dtype == token_dtype(vocab_size)
    assert shard.tolist() == tokens
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_headerless_is_read_when_named(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(np.arange(5000, dtype="<u2").tobytes())
    assert open_shard(path, headerless=True).tolist() == list(range(5000))
    assert open_files([path, path], vocab_size=5000, headerless=True).read(4998, 4).tolist() == [4998, 4999, 0, 1]
    with pytest.raises(UserError, match=r"train\.bin is no shard"):
        open_shard(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (by_hand([1, 2])[:600], "truncated: 600 bytes"),
        (by_hand([1, 2])[:-1], r"counts 2 tokens, 1,028 bytes in all, but the file has 1,027"),
        (by_hand([1, 2]) + b"\0\0", "but the file has 1,030"),
        (by_hand([]), "counts 0 tokens"),
        (b"\x07" + by_hand([1, 2])[1:], "is no shard: it begins with the numbers"),
        (by_hand([1])[:4] + by_hand([1], wide=True)[4:], "is no shard"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        open_shard(path)
    assert str(path) in str(raised.value)


def test_missing_and_odd_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.bin is missing"):
        open_shard(tmp_path / "nowhere.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="odd number"):
        open_shard(tmp_path / "odd.bin", headerless=True)


@pytest.mark.parametrize("tokens", [[1000], [-1], []])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit|holds 1 to"):
        write_shard(tmp_path / "a.bin", np.array(tokens, dtype=np.int64), vocab_size=1000)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "old", parts())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old": b"old"}
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_atomically(tmp_path / "absent" / "file", [b"x"])


def test_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tiny disk takes root")
    try:
        with pytest.raises(UserError, match=f"the disk of {tmp_path} is full: a.bin could not be written"):
            write_shard(tmp_path / "a.bin", np.zeros(100_000, dtype=np.uint16), vocab_size=10)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_stream_reads_across_shards(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(lengths)[:-1]), vocab_size=100)
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    assert len(stream) == len(whole)
    assert stream.read(start, length).tolist() == whole[start : start + length].tolist()


def test_stream_refuses_what_lies_outside(tmp_path: Path) -> None:
    save_folder(tmp_path, {"train_000000.bin": [1, 2], "train_000001.bin": [3]})
    stream = open_split(tmp_path, "train")
    for start, length in [(0, 4), (-1, 1), (3, 1), (1, -1)]:
        with pytest.raises(IndexError, match="outside a stream of 3"):
            stream.read(start, length)


def test_split_follows_the_manifest(tmp_path: Path) -> None:
    shards = {"train_000001.bin": [4, 5], "val_000000.bin": [9], "train_000000.bin": [1, 2, 3]}
    save_folder(tmp_path, shards)
    train = open_split(tmp_path, "train")
    assert (train.vocab_size, train.dtype) == (1000, np.uint16)
    assert train.read(0, len(train)).tolist() == [4, 5, 1, 2, 3]
    assert open_split(tmp_path, "val").read(0, 1).tolist() == [9]
    verify(tmp_path)


def test_wide_vocabulary_round_trip(tmp_path: Path) -> None:
    save_folder(tmp_path, {"train_000000.bin": [70_000, 1]}, vocab_size=70_001)
    stream = open_split(tmp_path, "train")
    assert stream.dtype == np.uint32
    assert stream.read(0, 2).tolist() == [70_000, 1]
    with pytest.raises(UserError, match="too wide for a vocabulary of 50,257"):
        open_files([tmp_path / "train_000000.bin"], vocab_size=50_257)


def test_manifest_round_trip_and_totals(tmp_path: Path) -> None:
    manifest = save_folder(tmp_path, {"train_000000.bin": [1, 2], "train_000001.bin": [3], "val_000000.bin": [4]})
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert (loaded.tokens("train"), loaded.tokens("val"), loaded.documents("train")) == (3, 1, 2)
    assert loaded.text_bytes("val") == 7
    assert json.loads(manifest.to_bytes())["totals"]["train"] == {"tokens": 3, "documents": 2, "text_bytes": 14}
    other = dataclasses.replace(manifest, settings={"val_fraction": 0.2})
    assert other.fingerprint != manifest.fingerprint


def test_shards_that_changed_after_the_manifest(tmp_path: Path) -> None:
    save_folder(tmp_path, {"train_000000.bin": [1, 2], "train_000001.bin": [3]})
    path = tmp_path / "train_000001.bin"
    path.write_bytes(by_hand([4]))
    open_split(tmp_path, "train")  # same length: only the checksum can tell
    with pytest.raises(UserError, match=r"train_000001\.bin is damaged: its sha256"):
        verify(tmp_path)
    path.write_bytes(by_hand([4, 5]))
    with pytest.raises(UserError, match=r"train_000001\.bin holds 2 tokens of 2 bytes, but the manifest says 1 of 2"):
        open_split(tmp_path, "train")
    path.write_bytes(by_hand([3], wide=True))
    with pytest.raises(UserError, match="holds 1 tokens of 4 bytes"):
        open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin is missing"):
        open_split(tmp_path, "train")


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not finished: it has no manifest\.json; run jobs/tokenize"):
        Manifest.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path / "absent")
    for content in ["", "[]", "{}", '{"format": 1}', '{"format": 1, "totals": 0, "shards": [{"bad": 1}]}']:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version of this project"):
        Manifest.load(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path)
