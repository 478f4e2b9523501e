"""Tokenization from hub and bucket, into a bucket, with faults: the same bytes as from and to a disk."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.preprocessing import tokenization
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.file_server import running_files
from tests.support.fixtures import ROOT, contents
from tests.support.planted_corpus import planted_corpus
from tests.support.s3_server import S3, Fault, FaultyProxy, environment


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub({}) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def ray_with_servers(
    hub: FakeHub, s3_endpoint: FaultyProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Workers see the servers that this process sees."""
    variables = {
        **environment(s3_endpoint.url),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "GPT25_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", "hf_secret")
        ray.shutdown()  # a job of an earlier test may have left its own Ray
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        yield
        ray.shutdown()
    assert not [path for path in Path(variables["GPT25_CACHE"]).rglob("*") if path.suffix == ".part"]


@pytest.fixture
def files(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.iterdir()}


@pytest.fixture
def config(corpus: Path, documents: list[str], tmp_path: Path) -> TokenizeConfig:
    bpe_training.train_bpe(documents, 300).save(tmp_path / "tokenizer.json")
    return TokenizeConfig(
        source=str(corpus),
        tokenizer=str(tmp_path / "tokenizer.json"),
        item_bytes=12_000,
        val_fraction=0.2,
        num_workers=2,
    )


@pytest.fixture
def expected(config: TokenizeConfig, tmp_path: Path) -> dict[str, str]:
    """What a run from disk to disk writes."""
    tokenization.tokenize(config, open_folder(tmp_path / "local"))
    return shards_in(tmp_path / "local")


def shards_in(folder: Path) -> dict[str, str]:
    return {name: value for name, value in contents(folder).items() if name.endswith(".bin")}


def test_hub_source_stays_at_its_commit(
    config: TokenizeConfig, files: dict[str, bytes], expected: dict[str, str], tmp_path: Path, hub: FakeHub
) -> None:
    from_hub = dataclasses.replace(config, source=f"hf://datasets/{NAME}")
    hub.commits[hub.branch] = files
    output = tmp_path / "out"
    tokenization.tokenize(from_hub, open_folder(output))
    manifest = Manifest.load(output)
    assert all(hub.branch in entry["version"] for entry in manifest.inputs)
    hub.push("b" * 40, {"other.txt": b"moved on"})
    (output / "train_000000.bin").unlink()
    assert tokenization.tokenize(from_hub, open_folder(output)).num_items_done == 1
    assert shards_in(output) == expected
    hub.push("a" * 40, files)
    hub.failing = True  # what is done needs no hub
    assert tokenization.finished(from_hub, open_folder(output)) == manifest
    hub.failing = False
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_hub_with_faults(
    config: TokenizeConfig, files: dict[str, bytes], expected: dict[str, str], tmp_path: Path, hub: FakeHub
) -> None:
    hub.push("a" * 40, files)
    hub.traffic.forget()
    hub.traffic.fail(status=429, headers={"Retry-After": "0"}, after=2, times=2)
    hub.traffic.fail(status=503, after=1, times=2)
    hub.traffic.fail(cut_after=1_000, path="b.parquet")
    hub.traffic.fail(content=b"x" * len(files["c.jsonl"]), path="c.jsonl")  # wrong once
    from_hub = dataclasses.replace(config, source=f"hf://datasets/{NAME}")
    tokenization.tokenize(from_hub, open_folder(tmp_path / "out"))
    assert not [fault for fault in hub.traffic.faults if fault.times]
    assert shards_in(tmp_path / "out") == expected
    assert verify(tmp_path / "out") == []


def test_hub_file_of_a_wrong_checksum(
    config: TokenizeConfig, files: dict[str, bytes], expected: dict[str, str], tmp_path: Path, hub: FakeHub
) -> None:
    hub.push("a" * 40, files)
    hub.traffic.forget()
    hub.traffic.fail(content=b"x" * len(files["c.jsonl"]), path="c.jsonl", times=10**6)
    from_hub = dataclasses.replace(config, source=f"hf://datasets/{NAME}")
    with pytest.raises(UserError, match=r"c\.jsonl.*(checksum|sha256)") as raised:
        tokenization.tokenize(from_hub, open_folder(tmp_path / "out"))
    assert "\n" not in str(raised.value)
    skipping = dataclasses.replace(from_hub, skip_bad_files=True)
    tokenization.tokenize(skipping, open_folder(tmp_path / "out"))
    manifest = Manifest.load(open_folder(tmp_path / "out"))
    hub.traffic.forget()
    (damaged,) = manifest.damaged
    assert damaged["name"].startswith("c.jsonl") and "c.jsonl" in damaged["reason"]
    kept = shards_in(tmp_path / "out")
    assert kept == {name: value for name, value in expected.items() if name in kept} and 0 < len(kept) < len(expected)


def test_bucket_to_bucket(
    config: TokenizeConfig, files: dict[str, bytes], expected: dict[str, str], tmp_path: Path, s3: S3
) -> None:
    for name, content in files.items():
        s3.put(f"raw/{name}", content)
    from_bucket = dataclasses.replace(config, source=f"{s3.url}/raw")
    output = open_folder(f"{s3.url}/shards")
    s3.fail(Fault(status=503), times=4)
    s3.fail(Fault(forward=True, cut_after=500, method="GET"))
    tokenization.tokenize(from_bucket, output)
    manifest = Manifest.load(output)
    assert verify(output) == []
    written = {key.removeprefix("shards/"): s3.get(key) for key in sorted(s3.objects()) if key.startswith("shards/")}
    for name, content in written.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert shards_in(tmp_path / "copy") == expected
    assert Manifest.load(tmp_path / "copy") == manifest
    assert not s3.unfinished_uploads() and not [name for name in written if ".tmp-" in name]

    assert tokenization.finished(from_bucket, output) == manifest
    s3.client.delete_object(Bucket=s3.bucket, Key="shards/train_000001.bin")
    assert tokenization.finished(from_bucket, output) is None
    assert tokenization.tokenize(from_bucket, output).num_items_done == 1
    s3.put("raw/c.jsonl", files["c.jsonl"] + b'{"text": "more"}\n')
    with pytest.raises(UserError, match=r"c\.jsonl has changed in the source since output folder s3://"):
        tokenization.tokenize(from_bucket, output)


def test_near_duplicates_and_questions_from_a_bucket_to_a_bucket(
    config: TokenizeConfig, tmp_path: Path, s3: S3
) -> None:
    """Signatures, pairs and the list of a bucket's output lie in the bucket, too."""
    corpus = planted_corpus()
    local = dataclasses.replace(corpus.write(tmp_path), tokenizer=config.tokenizer)
    tokenization.tokenize(local, open_folder(tmp_path / "local"))
    for name, content in corpus.parquet(3).items():
        s3.put(f"raw/{name}", content)
    s3.put("questions.jsonl", corpus.question_lines())
    there = dataclasses.replace(local, source=f"{s3.url}/raw", decontaminate=(f"{s3.url}/questions.jsonl",))
    output = open_folder(f"{s3.url}/shards")
    s3.fail(Fault(status=503), times=4)
    tokenization.tokenize(there, output)
    manifest = Manifest.load(output)
    assert manifest.skipped == corpus.skipped and verify(output) == []
    assert tokenization.finished(there, output) == manifest
    written = {key.removeprefix("shards/"): s3.get(key) for key in s3.objects() if key.startswith("shards/")}
    shards = {name: content for name, content in written.items() if name.endswith(".bin")}
    assert shards == {name: (tmp_path / "local" / name).read_bytes() for name in shards_in(tmp_path / "local")}
    questions = [json.loads(line)["question"] for line in written["contaminated.jsonl"].splitlines()]
    assert questions == [question for _, question in corpus.listed]
    assert not [name for name in written if name.startswith(("items/signatures", "items/pairs", "items/duplicates"))]
    assert manifest.settings["evaluation_sets"] == Manifest.load(tmp_path / "local").settings["evaluation_sets"]


def test_near_duplicates_and_questions_from_the_web(config: TokenizeConfig, tmp_path: Path) -> None:
    corpus = planted_corpus()
    local = dataclasses.replace(corpus.write(tmp_path, files=1), tokenizer=config.tokenizer)
    tokenization.tokenize(local, open_folder(tmp_path / "local"))
    with running_files({**corpus.parquet(1), "questions.jsonl": corpus.question_lines()}) as server:
        server.traffic.fail(status=503, times=2, path="questions.jsonl")
        questions = (f"{server.url}/questions.jsonl",)
        there = dataclasses.replace(local, source=f"{server.url}/00.parquet", decontaminate=questions)
        tokenization.tokenize(there, open_folder(tmp_path / "out"))
        assert not [fault for fault in server.traffic.faults if fault.times]
        assert Manifest.load(tmp_path / "out").skipped == corpus.skipped
        assert shards_in(tmp_path / "out") == shards_in(tmp_path / "local")
        server.files["questions.jsonl"] = b'{"question": "another one"}'
        with pytest.raises(UserError, match="another choice of evaluation questions"):
            tokenization.finished(there, open_folder(tmp_path / "out"))


def test_bucket_that_refuses_to_be_written(config: TokenizeConfig, s3: S3) -> None:
    with pytest.raises(UserError) as raised:
        tokenization.tokenize(config, open_folder("s3://no-such-bucket/shards"))
    assert "no-such-bucket" in str(raised.value) and "\n" not in str(raised.value)


def test_a_small_part_of_a_large_file_is_fetched_by_ranges(
    config: TokenizeConfig, files: dict[str, bytes], tmp_path: Path, hub: FakeHub
) -> None:
    whole = b"".join(json.dumps({"text": f"line {i} " * 40}).encode() + b"\n" for i in range(40_000))
    hub.push("c" * 40, {"a.jsonl": whole})
    hub.traffic.forget()
    first = dataclasses.replace(config, source=f"hf://datasets/{NAME}", limit_bytes=1_000_000, item_bytes=4_000_000)
    tokenization.tokenize(first, open_folder(tmp_path / "out"))
    manifest = Manifest.load(open_folder(tmp_path / "out"))
    assert 1_000_000 <= manifest.text_bytes("train") + manifest.text_bytes("val") < 6_000_000
    assert hub.traffic.sent_bytes < len(whole) / 2
    hub.push("a" * 40, files)


def test_several_files_are_fetched_at_a_time(config: TokenizeConfig, hub: FakeHub, tmp_path: Path) -> None:
    """The hub answers only when two requests for files wait, so one at a time would never end."""
    content: dict[str, Any] = {f"{i}.txt": f"text {i} ".encode() * 2_000 for i in range(6)}
    hub.push("d" * 40, content)
    hub.traffic.forget()
    hub.traffic.together = threading.Barrier(2)
    try:
        several = dataclasses.replace(config, source=f"hf://datasets/{NAME}", download_workers=2)
        tokenization.tokenize(several, open_folder(tmp_path / "out"))
        manifest = Manifest.load(open_folder(tmp_path / "out"))
    finally:
        hub.traffic.together = None
    assert manifest.documents("train") + manifest.documents("val") == 6
