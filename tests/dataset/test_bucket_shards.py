"""Shards of a bucket: copied to the node once, verified, by one of several processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.errors import UserError
from pipeline.storage import node_copy
from pipeline.storage.folders import Folder, open_folder
from tests.support.s3_server import S3, Fault, environment
from tests.support.shards import by_hand, save_folder

ROOT = Path(__file__).resolve().parents[2]


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
    answers = [process.communicate(timeout=1200)[0].decode().split() for process in processes]
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
