"""Shards, manifest and token stream against bytes put together by hand, and against damage of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import (
    ShardFiles,
    TokenStream,
    open_shard,
    open_split,
    shard_parts,
    token_dtype,
)
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.storage.folders import in_threads, write_atomically
from tests.support.shards import by_hand, save_folder


@pytest.mark.parametrize(("vocab_size", "wide"), [(65536, False), (65537, True)])
def test_bytes_are_those_of_the_format(tmp_path: Path, vocab_size: int, wide: bool) -> None:
    tokens = [0, 1, 65535, 3]
    digest = write_atomically(tmp_path / "a.bin", shard_parts(np.array(tokens), vocab_size=vocab_size))
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
    twice = TokenStream([open_shard(path, headerless=True)] * 2, vocab_size=5000)
    assert twice.read(4998, 4).tolist() == [4998, 4999, 0, 1]
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
        write_atomically(tmp_path / "a.bin", shard_parts(np.array(tokens, dtype=np.int64), vocab_size=1000))
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
            write_atomically(tmp_path / "a.bin", shard_parts(np.zeros(100_000, dtype=np.uint16), vocab_size=10))
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
    save_folder(tmp_path, {"train_000001.bin": [0, 5], "val_000000.bin": [0], "train_000000.bin": [0, 2, 3]})
    train = open_split(tmp_path, "train")
    assert (train.vocab_size, train.dtype) == (1000, np.uint16)
    assert train.read(0, len(train)).tolist() == [0, 5, 0, 2, 3]
    assert open_split(tmp_path, "val").read(0, 1).tolist() == [0]
    assert verify(tmp_path) == []


def test_wide_vocabulary_round_trip(tmp_path: Path) -> None:
    save_folder(tmp_path, {"train_000000.bin": [70_000, 1]}, vocab_size=70_001)
    stream = open_split(tmp_path, "train")
    assert stream.dtype == np.uint32
    assert stream.read(0, 2).tolist() == [70_000, 1]


def test_manifest_round_trip_and_totals(tmp_path: Path) -> None:
    manifest = save_folder(tmp_path, {"train_000000.bin": [0, 2], "train_000001.bin": [0], "val_000000.bin": [0, 0]})
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    content = (tmp_path / "manifest.json").read_bytes()
    assert loaded.fingerprint == hashlib.sha256(content).hexdigest()
    assert (loaded.tokens("train"), loaded.tokens("val"), loaded.documents("val")) == (3, 2, 2)
    assert loaded.text_bytes("val") == 7
    values = json.loads(content)
    assert values["totals"]["train"] == {"tokens": 3, "documents": 2, "text_bytes": 14}
    later = {"headerless": None, "learned_tokens": None}
    plain = [dataclasses.asdict(entry) | later for entry in manifest.shards]
    assert [entry | later for entry in values["shards"]] == plain
    assert not any(later.keys() & entry.keys() for entry in values["shards"]), "fields that others do not know"
    bare = dataclasses.replace(manifest, shards=(dataclasses.replace(manifest.shards[0], headerless=True),))
    bare.save(tmp_path)
    assert Manifest.load(tmp_path) == bare and bare.fingerprint != manifest.fingerprint
    assert (values["inputs"][1]["name"], values["damaged"][0]["name"], values["skipped"]) == ("żółw", "y", {"empty": 2})
    assert sum(b"train_00000" in line for line in content.splitlines()) == 2  # a line for each
    other = dataclasses.replace(manifest, settings={"val_fraction": 0.2})
    assert other.fingerprint != manifest.fingerprint


def test_shards_that_changed_after_the_manifest(tmp_path: Path) -> None:
    save_folder(tmp_path, {"train_000000.bin": [0, 2], "train_000001.bin": [0]})
    path = tmp_path / "train_000001.bin"
    path.write_bytes(by_hand([4]))
    open_split(tmp_path, "train")  # same length: only the checksum can tell
    path.write_bytes(by_hand([4, 5]))
    with pytest.raises(UserError, match=r"train_000001\.bin holds 2 tokens of 2 bytes, but the manifest says 1 of 2"):
        open_split(tmp_path, "train")
    path.write_bytes(by_hand([3], wide=True))
    with pytest.raises(UserError, match="holds 1 tokens of 4 bytes"):
        open_split(tmp_path, "train")
    path.write_bytes(by_hand([3])[:-1])
    with pytest.raises(UserError, match="is damaged: its header counts 1 tokens"):
        open_split(tmp_path, "train")
    path.write_bytes(b"?" + by_hand([3])[1:])
    stream = open_split(tmp_path, "train")  # of the right size: its header is looked at when it is read
    assert stream.read(0, 2).tolist() == [0, 2]
    with pytest.raises(UserError, match=r"train_000001\.bin is no shard"):
        stream.read(1, 2)
    path.unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin is missing"):
        open_split(tmp_path, "train")


# ---- many shards -----------------------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_shards_are_mapped_when_they_are_read(tmp_path: Path) -> None:
    names = [f"train_{index:06d}.bin" for index in range(200)]
    manifest = save_folder(tmp_path, {name: [0, index] for index, name in enumerate(names)})
    files = ShardFiles(tmp_path, manifest.shards, vocab_size=1000, max_maps=10)
    before = open_descriptors()
    files.check_sizes()
    assert open_descriptors() == before
    stream = TokenStream(files, vocab_size=1000)
    whole = [value for index in range(200) for value in (0, index)]
    assert stream.read(0, 400).tolist() == whole
    assert open_descriptors() <= before + 10
    kept = files[3]
    first, second = files[7], files[7]
    assert first is second  # still mapped
    stream.read(0, 400)
    assert files[7] is not first  # let go
    assert kept.tolist() == [0, 3]  # whoever still has it can read it


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    lengths = [1 + index % 7 for index in range(50)]
    contents = {f"train_{index:06d}.bin": [index] * length for index, length in enumerate(lengths)}
    manifest = save_folder(tmp_path, contents)
    whole = [index for index, length in enumerate(lengths) for _ in range(length)]
    stream = TokenStream(ShardFiles(tmp_path, manifest.shards, vocab_size=1000, max_maps=2), vocab_size=1000)
    starts = [start % (len(whole) - 20) for start in range(0, 20_000, 7)]
    wrong = []

    def read(start: int) -> None:
        if stream.read(start, 20).tolist() != whole[start : start + 20]:
            wrong.append(start)

    in_threads(read, starts, 8)
    assert wrong == []


def test_threads_stop_at_the_first_error() -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 5:
            raise UserError("five")
        time.sleep(0.001)

    with pytest.raises(UserError, match="five"):
        in_threads(work, range(1_000_000), 2)
    assert 6 <= len(begun) < 900_000  # a quarter of an hour of pauses: the other one does not go through them all
    begun.clear()
    in_threads(begun.append, [], 4)
    in_threads(begun.append, [7, 8], 4)
    assert sorted(begun) == [7, 8]


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not finished: it has no manifest\.json; run jobs/tokenize"):
        Manifest.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path / "absent")
    for content in ["", "[]", "{}", '{"format": 1}', '{"format": 1, "totals": 0, "shards": [{"bad": 1}]}']:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            Manifest.load(tmp_path)
    save_folder(tmp_path, {"train_000000.bin": [0, 1]})
    content = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(content.replace('"tokens": 2', '"tokens": 3', 1))
    with pytest.raises(UserError, match="is damaged: its totals are not those of its shards"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version of this project"):
        Manifest.load(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path)
