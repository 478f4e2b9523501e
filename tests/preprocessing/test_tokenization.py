"""Tokenization on a real local Ray: shards against the documents that went in, through crashes and mistakes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import xxhash

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_shard, open_split
from pipeline.dataset.verification import verify
from pipeline.errors import DamagedInputError, UserError
from pipeline.preprocessing import ray_dataflow, resume_state, stages, tokenization, train_tokenizer_job
from pipeline.preprocessing.encode_documents import split_by_hash
from pipeline.preprocessing.progress import ItemProgress
from pipeline.preprocessing.rows import ItemRow
from pipeline.preprocessing.tokenization import DataReport
from pipeline.sources import readers
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import END_OF_TEXT, Tokenizer
from tests.support.fixtures import contents

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe_training.train_bpe(documents, 300).save(path)
    return path


@pytest.fixture
def config(corpus: Path, tokenizer_path: Path) -> TokenizeConfig:
    return TokenizeConfig(
        source=str(corpus), tokenizer=str(tokenizer_path), item_bytes=12_000, val_fraction=0.2, num_workers=2
    )


def read_split(output: Path, split: str) -> list[str]:
    """The documents of a split, decoded, in order."""
    tokenizer = Tokenizer.from_file(output / "tokenizer.json")
    stream = open_split(output, split)
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == tokenizer.eot_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def tokenize(config: TokenizeConfig, output: Path) -> DataReport:
    return tokenization.tokenize(config, open_folder(output))


def finished(config: TokenizeConfig, output: Path) -> Manifest | None:
    return tokenization.finished(config, open_folder(output))


def mistake(config: TokenizeConfig, output: Path) -> str:
    with pytest.raises(UserError) as raised:
        tokenize(config, output)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_shards_hold_the_documents(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = tokenize(config, output)
    manifest = Manifest.load(output)
    assert (summary.train_tokens, summary.val_tokens) == (manifest.tokens("train"), manifest.tokens("val"))
    assert summary.documents == manifest.documents("train") + manifest.documents("val")
    assert (summary.num_items, summary.num_items_done) == (5, 5)
    assert summary.tokens == manifest.tokens("train") + manifest.tokens("val")
    assert summary.text_bytes == sum(len(text.encode()) for text in documents)
    assert manifest.skipped == {"blank": 1, "null": 1}
    train, val = read_split(output, "train"), read_split(output, "val")
    is_val = [xxhash.xxh3_64_intdigest(text.encode()) < 0.2 * 2**64 for text in documents]
    assert train == [text for text, held_out in zip(documents, is_val, strict=True) if not held_out]
    assert val == [text for text, held_out in zip(documents, is_val, strict=True) if held_out]
    assert (manifest.documents("train"), manifest.documents("val")) == (len(train), len(val))
    assert manifest.text_bytes("val") == sum(len(text.encode()) for text in val)
    assert str(tmp_path) not in (output / "manifest.json").read_text()
    assert verify(output) == []


def test_any_number_of_workers_writes_the_same_bytes(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenize(dataclasses.replace(config, num_workers=1), tmp_path / "one")
    tokenize(dataclasses.replace(config, num_workers=None), tmp_path / "all")
    assert contents(tmp_path / "one") == contents(tmp_path / "all")


def test_tokenizer_is_trained_on_train_documents(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    trained = dataclasses.replace(config, tokenizer=None, vocab_size=320)
    tokenize(trained, tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    train, _ = split_by_hash(pa.chunked_array([pa.array(documents, pa.large_string())]), 0.2)
    expected = bpe_training.train_bpe(train.to_pylist(), 320)
    assert manifest.tokenizer_fingerprint == expected.fingerprint
    assert (manifest.vocab_size, manifest.eot_id) == (320, 319)
    assert len(read_split(tmp_path / "out", "train")) == len(train)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert tokenize(trained, tmp_path / "out").num_items_done == 0
    assert contents(tmp_path / "out") == before
    sampled = dataclasses.replace(trained, sample_bytes=12_000, vocab_size=280)
    tokenize(sampled, tmp_path / "sampled")
    assert "trained with sample_bytes 1,000,000,000 and vocab_size 320, not trained" in mistake(
        sampled, tmp_path / "out"
    )
    assert "the text supports a vocabulary of" in mistake(
        dataclasses.replace(trained, vocab_size=50_257), tmp_path / "too large"
    )


def test_large_vocabulary_takes_four_bytes(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    special_tokens = {f"<|{i}|>": 256 + i for i in range(65_536)} | {END_OF_TEXT: 65_792}
    tokens = [bytes([i]) for i in range(256)] + [name.encode() for name in special_tokens]
    Tokenizer(tokens, [], special_tokens).save(tmp_path / "large.json")
    tokenize(dataclasses.replace(config, tokenizer=str(tmp_path / "large.json")), tmp_path / "out")
    assert open_split(tmp_path / "out", "train").dtype == np.uint32
    assert sorted(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")) == sorted(documents)


def test_stages_of_an_item_are_one_task() -> None:
    """So text does not travel: Ray fuses the stages."""

    def tell_task(table: pa.Table, name: str) -> Iterator[pa.Table]:
        row = ItemRow.from_table(table)
        tasks = {**row.figures.get("tasks", {}), name: ray.get_runtime_context().get_task_id()}
        yield ItemRow(item=row.item, figures={"text_bytes": 1, "tokens": 1, "is_last": True, "tasks": tasks}).to_table()

    items = [WorkItem(index=index, slices=(), text_column="text") for index in range(4)]
    steps: ray_dataflow.Stages = [(tell_task, {"name": name}) for name in ("first", "second", "third")]
    settings = TokenizeConfig(num_workers=2)
    tasks = [set(row.figures["tasks"].values()) for row in ray_dataflow.run_items(items, steps, settings, title="test")]
    assert all(len(task) == 1 for task in tasks)
    assert len(set.union(*tasks)) == 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_more_items_at_a_time_than_workers(num_workers: int) -> None:
    """Though more tasks than that are handed to Ray, which has two CPUs."""

    def note_times(table: pa.Table) -> Iterator[pa.Table]:
        row, start = ItemRow.from_table(table), time.time()
        time.sleep(0.3)
        figures = {"text_bytes": 1, "tokens": 1, "is_last": True, "times": [start, time.time()]}
        yield ItemRow(item=row.item, figures=figures).to_table()

    items = [WorkItem(index=index, slices=(), text_column="text") for index in range(6)]
    settings = TokenizeConfig(num_workers=num_workers)
    times = [row.figures["times"] for row in ray_dataflow.run_items(items, [(note_times, {})], settings, title="test")]
    at_once = [sum(begin <= start < end for begin, end in times) for start, _ in times]
    assert len(times) == 6 and max(at_once) <= num_workers


# ---- crashes and resumes ---------------------------------------------------------------------------------------------


@pytest.fixture
def expected(config: TokenizeConfig, tmp_path: Path) -> dict[str, str]:
    """What an undisturbed run writes."""
    tokenize(config, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def test_killed_worker(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, marker = stages.write, tmp_path / "killed once"

    def die(fd: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(table: pa.Table, **arguments: Any) -> Any:
        if ItemRow.from_table(table).work_item.index == 2 and not marker.exists():
            marker.touch()
            os.fsync = die  # written, not yet renamed
        return write(table, **arguments)

    monkeypatch.setattr(stages, "write", dying_write)
    tokenize(config, tmp_path / "out")
    assert marker.exists()
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    monkeypatch.undo()
    (tmp_path / "out" / "manifest.json").unlink()
    assert tokenize(config, tmp_path / "out").num_items_done == 0
    assert contents(tmp_path / "out") == expected


def kill_at_item_1(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    """Whoever encodes item 1 dies, each time."""
    encode = stages.encode

    def dying_encode(table: pa.Table, **arguments: Any) -> Any:
        row = ItemRow.from_table(table)
        attempts = output / "items" / ".tmp-attempts-encode-000001"
        for number, result in enumerate(encode(table, **arguments)):
            if row.work_item.index == 1 and number == 0:
                noted = json.loads(attempts.read_text())
                if len(noted) == 1:
                    attempts.write_text(
                        json.dumps(noted * resume_state.MAX_ATTEMPTS)
                    )  # killed before: a kill takes seconds
                    os.kill(os.getpid(), signal.SIGKILL)
            yield result

    monkeypatch.setattr(stages, "encode", dying_encode)


def test_worker_killed_every_time(config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    kill_at_item_1(monkeypatch, output)
    assert "a.parquet row groups 1-2 is given up: its worker was killed 3 times, most likely for" in mistake(
        config, output
    )
    assert not (output / "manifest.json").exists()
    monkeypatch.undo()
    tokenize(config, output)
    assert verify(output) == []


def test_an_item_that_kills_its_worker_is_left_out(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    kill_at_item_1(monkeypatch, output)
    tokenize(dataclasses.replace(config, skip_bad_files=True), output)
    (damaged,) = Manifest.load(output).damaged
    assert damaged["name"] == "a.parquet row groups 1-2" and "was killed 3 times" in damaged["reason"]
    found = contents(output)
    assert {name for name in expected.keys() - found.keys() if name.endswith(".bin")} == {
        "train_000001.bin",
        "val_000001.bin",
    }
    assert all(expected[name] == found[name] for name in found if name.endswith(".bin"))


def test_attempts_elsewhere_are_not_held_against_a_task(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)

    def begin(job: str, node: str, alive: set[str]) -> None:
        resume_state.begin_attempt(folder, "encode-000001", label="x", job=job, node=node, alive_nodes=lambda: alive)

    for node in ("a", "b", "c"):
        begin("job 1", node, {"z"})  # a, b and c died
    for _ in range(3):
        begin("job 2", "z", {"z"})
    with pytest.raises(DamagedInputError, match="x is given up"):
        begin("job 2", "z", {"z"})
    begin("job 3", "z", {"z"})
    resume_state.end_attempt(folder, "encode-000001")
    assert not list(tmp_path.rglob("*attempts*"))


def test_interrupted_run_goes_on(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, interrupted = tmp_path / "out", tmp_path / "interrupted"
    add, write = ItemProgress.add, stages.write

    def interrupted_add(self: ItemProgress, *figures: int, is_last: bool) -> None:
        add(self, *figures, is_last=is_last)
        if self._items == 2:
            interrupted.touch()
            raise KeyboardInterrupt

    def write_three(table: pa.Table, **arguments: Any) -> Iterator[pa.Table]:
        """Ray hands on the second row when it has the third. What runs beyond the interruption writes nothing."""
        if len(list((output / "items").glob("0*.json"))) < 3:
            yield from write(table, **arguments)
            return
        while not interrupted.exists():
            time.sleep(0.05)

    monkeypatch.setattr(ItemProgress, "add", interrupted_add)
    monkeypatch.setattr(stages, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        tokenize(dataclasses.replace(config, num_workers=1), output)
    monkeypatch.undo()
    assert finished(config, output) is None
    done = {path.stem: path.stat().st_mtime_ns for path in (output / "items").glob("0*.json")}
    assert len(done) == 3
    (output / ".tmp-train_000009.bin-0").write_bytes(b"half")
    (output / "items" / ".tmp-000009.json-0").write_bytes(b"half")
    summary = tokenize(config, output)
    assert summary.num_items_done == 5 - len(done)
    assert contents(output) == expected
    assert {
        path.stem: path.stat().st_mtime_ns for path in (output / "items").glob("0*.json") if path.stem in done
    } == done


def test_finished_run_is_left_alone(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "undisturbed"
    assert finished(config, tmp_path / "new") is None
    monkeypatch.setattr(ray.data, "from_arrow", None)
    assert finished(dataclasses.replace(config, num_workers=7), output) == Manifest.load(output)
    assert tokenize(config, output).num_items_done == 0
    assert contents(output) == expected


@pytest.mark.parametrize("lost", ["train_000001.bin", "items/000001.json", "tokenizer.json"])
def test_lost_files_are_made_again(config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, lost: str) -> None:
    output = tmp_path / "undisturbed"
    (output / lost).unlink()
    if not lost.startswith("items"):
        assert finished(config, output) is None
    tokenize(config, output)
    assert contents(output) == expected


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 0.1}, "was begun with val_fraction 0.2, not 0.1; delete it or choose another --output"),
        ({"item_bytes": 9}, "was begun with item_bytes 12000, not 9"),
        ({"text_column": "body"}, "was begun with text_column text, not body"),
        ({"tokenizer": None}, r"was begun with tokenizer of fingerprint \w{16}\.\.\., not trained with sample_bytes"),
    ],
)
def test_other_settings_are_refused(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, change: Any, message: str
) -> None:
    output, other = tmp_path / "undisturbed", dataclasses.replace(config, **change)
    for function in (finished, tokenize):
        with pytest.raises(UserError, match=message):
            function(other, output)
    assert contents(output) == expected
    (output / "manifest.json").unlink()
    for function in (finished, tokenize):
        with pytest.raises(UserError, match=message):
            function(other, output)


@pytest.mark.parametrize("is_done", [True, False])
def test_input_that_changes(
    config: TokenizeConfig, corpus: Path, expected: dict[str, str], tmp_path: Path, is_done: bool
) -> None:
    output = tmp_path / "undisturbed"
    if not is_done:
        (output / "manifest.json").unlink()
    before = contents(output)
    path = corpus / "c.jsonl"
    whole, stat = path.read_bytes(), path.stat()

    def refused(message: str) -> None:
        for function in (tokenize, *([finished] if is_done else [])):
            with pytest.raises(UserError, match=message):
                function(config, output)

    path.write_text('{"text": "all new"}\n')
    refused(r"c\.jsonl has changed in the source since output folder .* was begun; delete it or choose another")
    path.unlink()
    refused(r"c\.jsonl is missing from the source")
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (corpus / "d.txt").write_text("more")
    refused(r"d\.txt is new in the source")
    assert contents(output) == before
    (corpus / "d.txt").unlink()
    assert tokenize(config, output).num_items_done == 0
    assert contents(output) == expected


def test_mistake_in_a_task_is_one_sentence(config: TokenizeConfig, corpus: Path, tmp_path: Path) -> None:
    whole = (corpus / "c.jsonl").read_bytes()
    (corpus / "c.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "a\xff"}\n' + whole)
    output = tmp_path / "out"
    assert mistake(config, output) == f"line 2 of {corpus}/c.jsonl is not UTF-8 text: byte 11 is 0xff"
    assert not (output / "manifest.json").exists()
    assert all(len(open_shard(path)) for path in output.glob("*.bin"))
    tokenize(dataclasses.replace(config, skip_bad_files=True), output)
    manifest = Manifest.load(output)
    assert manifest.damaged == () and manifest.skipped["not UTF-8"] == 1
    assert manifest.first_skipped == {"not UTF-8": "line 2 of c.jsonl is not UTF-8 text: byte 11 is 0xff"}
    found = read_split(output, "train") + read_split(output, "val")
    assert "fine" in found and all(json.loads(line)["text"] in found for line in whole.splitlines()[:80])
    assert verify(output) == []


def test_full_disk(config: TokenizeConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(output)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk takes root")
    try:
        assert f"the disk of {output}" in mistake(config, output)
        assert not list(output.glob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(output)], check=True)
        tokenize(config, output)
        assert verify(output) == []
    finally:
        subprocess.run(["umount", str(output)], check=True)


def test_folder_that_is_not_ours(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "train_000000.bin").write_bytes(b"somebody's")
    assert "holds shards of unknown origin; choose another --output" in mistake(config, tmp_path)
    assert "cannot be made: Not a directory" in mistake(config, tmp_path / "train_000000.bin" / "out")
    assert [path.name for path in tmp_path.glob("*.*")] == ["train_000000.bin"]
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        finished(config, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "summary.json"])
def test_a_file_of_somebody_is_not_replaced(config: TokenizeConfig, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("precious")
    assert f"{output} holds a {name} of unknown origin, which the job would replace" in mistake(config, output)
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [(name, "precious")]


def test_files_beside_the_shards_stay(config: TokenizeConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tokenize(config, output)
    (output / "manifest.json").unlink()
    (output / "my_model.bin").write_bytes(b"precious")
    (output / "train_000099.bin").write_bytes(b"of an item that is no part of the plan")
    tokenize(config, output)
    assert (output / "my_model.bin").read_bytes() == b"precious"
    assert not (output / "train_000099.bin").exists()


def test_folder_of_another_job(config: TokenizeConfig, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    training = TrainTokenizerConfig(source=str(corpus), vocab_size=320, num_workers=2)
    shards, mine = tmp_path / "undisturbed", tmp_path / "mine"
    with pytest.raises(UserError, match="was begun by another job, or by another version of this one; choose another"):
        train_tokenizer_job.train_tokenizer(dataclasses.replace(training, output=str(shards)))
    assert contents(shards) == expected
    train_tokenizer_job.train_into(training, open_folder(mine))
    assert "was begun by another job" in mistake(config, mine)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="found holds files of unknown origin; choose another --output"):
        train_tokenizer_job.train_tokenizer(dataclasses.replace(training, output=str(tmp_path / "found")))
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["tokenizer.json"]


def test_no_document_at_all(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    empty = dataclasses.replace(config, source=str(tmp_path / "a.jsonl"))
    assert "a.jsonl holds no document that could be used (1 blank, 1 null)" in mistake(empty, tmp_path / "out")


# ---- parts of a source, copies, very large items ---------------------------------------------------------------------


def test_limits(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    first = dataclasses.replace(config, limit_documents=100)
    tokenize(first, tmp_path / "documents")
    manifest = Manifest.load(tmp_path / "documents")
    assert sorted(read_split(tmp_path / "documents", "train") + read_split(tmp_path / "documents", "val")) == sorted(
        documents[:100]
    )
    assert manifest.settings["limit_documents"] == 100
    tokenize(dataclasses.replace(config, limit_bytes=1), tmp_path / "bytes")
    texts = read_split(tmp_path / "bytes", "train") + read_split(tmp_path / "bytes", "val")
    assert sorted(texts) == sorted(documents[:80])  # the first row group
    assert "was begun with limit_documents 100, not None" in mistake(config, tmp_path / "documents")


def test_copies_are_left_out(config: TokenizeConfig, corpus: Path, documents: list[str], tmp_path: Path) -> None:
    (corpus / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[100:200]))
    once = dataclasses.replace(config, dedup="exact")
    output = tmp_path / "out"
    tokenize(once, output)
    manifest = Manifest.load(output)
    distinct = list(dict.fromkeys(documents))
    assert manifest.skipped == {"blank": 1, "duplicate": 100 + len(documents) - len(distinct), "null": 1}
    train, val = read_split(output, "train"), read_split(output, "val")
    held_out = set(split_by_hash(pa.chunked_array([pa.array(distinct, pa.large_string())]), 0.2)[1].to_pylist())
    assert train == [text for text in distinct if text not in held_out]
    assert val == [text for text in distinct if text in held_out]
    assert not (output / "items" / "hashes").exists() or not list((output / "items" / "hashes").iterdir())
    before = contents(output)
    (output / "train_000003.bin").unlink()
    tokenize(dataclasses.replace(once, num_workers=1), output)
    assert contents(output) == before


def test_a_very_large_item_becomes_several_shards(
    config: TokenizeConfig, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed file is one item, however large: here one of 20 times the expected size."""
    source = tmp_path / "all.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
    packed = dataclasses.replace(config, source=str(source), item_bytes=1_500)

    def small_batches(table: pa.Table, **arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # in the worker
            patch.setattr(readers, "_ARRAY_BYTES", 1_000)
            yield from encode(table, **arguments)

    encode = stages.encode
    monkeypatch.setattr(stages, "encode", small_batches)
    output = tmp_path / "out"
    tokenize(packed, output)
    manifest = Manifest.load(output)
    names = [entry.name for entry in manifest.shards if entry.split == "train"]
    assert names == ["train_000000.bin", *(f"train_000000-{part:03d}.bin" for part in range(1, len(names)))]
    assert len(names) > 5
    train, val = read_split(output, "train"), read_split(output, "val")
    sides = split_by_hash(pa.chunked_array([pa.array(documents, pa.large_string())]), 0.2)
    assert [train, val] == [side.to_pylist() for side in sides]
    assert sum(manifest.document_lengths) == len(documents) and verify(output) == []
    (output / names[3]).unlink()
    before = contents(output)
    assert tokenize(packed, output).num_items_done == 1
    assert contents(output).items() > before.items()
