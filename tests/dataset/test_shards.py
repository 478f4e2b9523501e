"""Shards, manifest and token stream against bytes put together by hand, and against damage of every kind."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import verification
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import (
    ShardFiles,
    TokenStream,
    open_files,
    open_shard,
    open_split,
    shard_parts,
    token_dtype,
    write_shard,
)
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.storage import node_copy
from pipeline.storage.folders import Folder, in_threads, open_folder, write_atomically
from tests.support.s3_server import S3, Fault, environment

ROOT = Path(__file__).resolve().parents[2]


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
    with pytest.raises(UserError, match="too wide for a vocabulary of 50,257"):
        open_files([tmp_path / "train_000000.bin"], vocab_size=50_257)


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
    assert values["shards"] == [dataclasses.asdict(entry) for entry in manifest.shards]
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


# ---- verification ----------------------------------------------------------------------------------------------------


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
        in_threads(work, range(10_000), 2)
    assert 6 <= len(begun) < 9_000  # the other one does not go through them all
    begun.clear()
    in_threads(begun.append, [], 4)
    in_threads(begun.append, [7, 8], 4)
    assert sorted(begun) == [7, 8]


# ---- shards of a bucket ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder in a bucket with shards; ranges of 1,000 bytes."""
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(node_copy, "_RANGE_BYTES", 1000)
    bucket = open_folder(s3.url + "/data")
    save_folder(bucket, {"train_000000.bin": [0, *range(999)], "train_000001.bin": [0, 7], "val_000000.bin": [0, 8]})
    return bucket


def test_shards_of_a_bucket_are_copied_once(bucket: Folder, s3: S3, tmp_path: Path) -> None:
    train = open_split(bucket, "train")
    assert train.read(0, len(train)).tolist() == [0, *range(999), 0, 7]
    copies = tmp_path / "cache" / f"shards-{Manifest.load(bucket).fingerprint[:20]}"
    assert sorted(path.name for path in copies.iterdir()) == [".lock", "train_000000.bin", "train_000001.bin"]
    s3.proxy.forget()
    assert open_split(bucket, "train").read(1000, 2).tolist() == [0, 7]
    assert [request for request in s3.requests if ".bin" in request] == []
    assert open_split(bucket, "val").read(0, 2).tolist() == [0, 8]
    (copies / "train_000001.bin").write_bytes(b"short")
    (copies / ".tmp-train_000000.bin-0").write_bytes(b"of a killed process")
    assert open_split(bucket, "train").read(1000, 2).tolist() == [0, 7]
    assert list(copies.glob(".tmp-*")) == []
    save_folder(bucket, {"train_000000.bin": [0, 5]})  # made anew
    assert open_split(bucket, "train").read(0, 2).tolist() == [0, 5]


def test_processes_that_start_together_copy_once(bucket: Folder, s3: S3, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.dataset.shards import open_split\n"
        "from pipeline.storage.folders import open_folder\n"
        "stream = open_split(open_folder(sys.argv[1]), 'train')\n"
        "print(len(stream), int(stream.read(0, len(stream)).sum()))\n"
    )

    def asked(name: str) -> list[str]:
        return [request for request in s3.requests if request.startswith("GET") and name in request]

    copies = tmp_path / "cache" / f"shards-{Manifest.load(bucket).fingerprint[:20]}"
    copies.mkdir(parents=True)
    s3.proxy.forget()
    variables = {**os.environ, **environment(s3.proxy.url), "GPT25_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, bucket.url]
    with (copies / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a fourth process that fetches
        processes = [subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE) for _ in range(3)]
        while len(asked("manifest.json")) < 3 and all(process.poll() is None for process in processes):
            time.sleep(0.05)
        time.sleep(0.3)
        assert asked(".bin") == []
    answers = [process.communicate(timeout=120)[0].decode().split() for process in processes]
    assert answers == [["1002", str(sum(range(999)) + 7)]] * 3
    assert (len(asked(".bin")), len(set(asked(".bin")))) == (2, 2)


def test_copying_is_verified(bucket: Folder, s3: S3, tmp_path: Path) -> None:
    s3.put("data/train_000001.bin", by_hand([0, 9]))
    with pytest.raises(UserError, match=rf"shard {bucket}/train_000001\.bin is damaged: its sha256"):
        open_split(bucket, "train")
    s3.put("data/train_000001.bin", by_hand([0, 7])[:-1])
    with pytest.raises(UserError, match="is damaged"):
        open_split(bucket, "train")
    s3.put("data/train_000000.bin", by_hand([0, 7]))  # ends before the second range
    with pytest.raises(UserError, match="is damaged"):
        open_split(bucket, "train")
    save_folder(bucket, {"train_000000.bin": [0, *range(999)], "train_000001.bin": [0, 7], "val_000000.bin": [0, 8]})
    bucket.delete("train_000001.bin")
    with pytest.raises(UserError, match=rf"shard {bucket}/train_000001\.bin is missing; run jobs/tokenize"):
        open_split(bucket, "train")
    (copies,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in copies.iterdir()} <= {".lock", "train_000000.bin"}
    s3.put("data/train_000001.bin", by_hand([0, 7]))
    s3.fail(
        Fault(contains=".bin", status=503), Fault(contains=".bin"), Fault(contains=".bin", forward=True, cut_after=9)
    )
    assert open_split(bucket, "train").read(1000, 2).tolist() == [0, 7]


def test_copying_to_a_full_disk(bucket: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3000))
        with pytest.raises(
            UserError, match=rf"the shards of {bucket} take 0\.00 GB, but the disk of .*set GPT25_CACHE to a"
        ):
            open_split(bucket, "train")
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"folder {tmp_path}/file/shards-.* cannot be made"):
        open_split(bucket, "train")


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
