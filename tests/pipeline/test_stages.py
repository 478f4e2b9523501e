"""Tokenization on a real local Ray: shards against the documents that went in, through crashes and mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import bpe_training, ledger, stages, tokenizer_training
from pipeline import documents as documents_module
from pipeline.bpe import END_OF_TEXT, Tokenizer
from pipeline.config import TokenizeConfig, TrainTokenizerConfig
from pipeline.documents import encode_documents, split_by_hash
from pipeline.errors import UserError
from pipeline.shards import Manifest, open_shard, open_split, verify
from pipeline.sources import WorkItem
from pipeline.stage_progress import ItemProgress
from tests.pipeline.conftest import contents
from tests.pipeline.fake_hub import NAME, running_hub

SHARE_OF_0_005 = int(0.005 * 2**64).to_bytes(8, "big")

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


def mistake(config: TokenizeConfig, output: Path) -> str:
    with pytest.raises(UserError) as raised:
        stages.tokenize(config, output)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_shards_hold_the_documents(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = stages.tokenize(config, output)
    manifest = Manifest.load(output)
    assert summary.manifest == manifest
    assert (summary.num_items, summary.num_items_done) == (5, 5)
    assert summary.tokens == manifest.tokens("train") + manifest.tokens("val")
    assert summary.text_bytes == sum(len(text.encode()) for text in documents)
    assert manifest.skipped == {"blank": 1, "null": 1}
    train, val = read_split(output, "train"), read_split(output, "val")
    is_val = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.2 * 2**64 for text in documents]
    assert train == [text for text, held_out in zip(documents, is_val, strict=True) if not held_out]
    assert val == [text for text, held_out in zip(documents, is_val, strict=True) if held_out]
    assert (manifest.documents("train"), manifest.documents("val")) == (len(train), len(val))
    assert manifest.text_bytes("val") == sum(len(text.encode()) for text in val)
    assert str(tmp_path) not in (output / "manifest.json").read_text()
    verify(output)


def test_any_number_of_workers_writes_the_same_bytes(config: TokenizeConfig, tmp_path: Path) -> None:
    stages.tokenize(dataclasses.replace(config, num_workers=1), tmp_path / "one")
    stages.tokenize(dataclasses.replace(config, num_workers=None), tmp_path / "all")
    assert contents(tmp_path / "one") == contents(tmp_path / "all")


def test_tokenizer_is_trained_on_train_documents(config: TokenizeConfig, documents: list[str], tmp_path: Path) -> None:
    trained = dataclasses.replace(config, tokenizer=None, vocab_size=320)
    summary = stages.tokenize(trained, tmp_path / "out")
    train, _ = split_by_hash(large_strings(documents), 0.2)
    expected = bpe_training.train_bpe(train.to_pylist(), 320)
    assert summary.manifest.tokenizer_fingerprint == expected.fingerprint
    assert (summary.manifest.vocab_size, summary.manifest.eot_id) == (320, 319)
    assert len(read_split(tmp_path / "out", "train")) == len(train)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert stages.tokenize(trained, tmp_path / "out").num_items_done == 0
    assert contents(tmp_path / "out") == before
    sampled = dataclasses.replace(trained, sample_bytes=12_000, vocab_size=280)
    stages.tokenize(sampled, tmp_path / "sampled")
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
    stages.tokenize(dataclasses.replace(config, tokenizer=str(tmp_path / "large.json")), tmp_path / "out")
    assert open_split(tmp_path / "out", "train").dtype == np.uint32
    assert sorted(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")) == sorted(documents)


def test_stages_of_an_item_are_one_task(tmp_path: Path) -> None:
    """So text does not travel: Ray fuses the stages."""

    def tell_task(row: pa.Table, name: str) -> pa.Table:
        figures = {} if "tokens" in row.column_names else {"size_bytes": [1], "text_bytes": [1], "tokens": [1]}
        columns = {column: row[column] for column in row.column_names}
        return pa.table({**columns, **figures, name: [ray.get_runtime_context().get_task_id()]})

    items = [WorkItem(index=index, pieces=(), text_column="text") for index in range(4)]
    names = ["first", "second", "third"]
    rows = list(stages._run_stages(items, [(tell_task, {"name": name}) for name in names], 2, title="test"))
    tasks = [{row[name][0].as_py() for name in names} for row in rows]
    assert all(len(task) == 1 for task in tasks)
    assert len(set.union(*tasks)) == 4


# ---- the split -------------------------------------------------------------------------------------------------------


def large_strings(*chunks: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string()) for texts in chunks])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=8)), fraction=st.floats(0, 1, exclude_max=True), shuffle=st.randoms())
@pytest.mark.parametrize("slice_bytes", [0, 10**9], ids=["slices", "copies"])
def test_split_depends_on_the_text_alone(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int, texts: list[str], fraction: float, shuffle: random.Random
) -> None:
    monkeypatch.setattr(documents_module, "_SLICE_BYTES", slice_bytes)
    copies = texts + texts
    shuffle.shuffle(copies)
    padded = large_strings(["before", *copies[: len(texts)]], [], [*copies[len(texts) :], "behind"])
    train, val = (part.to_pylist() for part in split_by_hash(padded.slice(1, len(copies)), fraction))
    alone = [split_by_hash(large_strings([text]), fraction)[1].to_pylist() for text in copies]
    assert val == [text for text, found in zip(copies, alone, strict=True) if found]
    assert train == [text for text, found in zip(copies, alone, strict=True) if not found]
    assert not set(train) & set(val)


def test_split_has_the_asked_share() -> None:
    texts = large_strings([f"document {i}" for i in range(20_000)])
    _, val = split_by_hash(texts, 0.1)
    assert abs(len(val) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5  # five standard deviations of a fair choice
    assert set(split_by_hash(texts, 0.05)[1].to_pylist()) < set(val.to_pylist())


def test_split_copies_no_train_document_where_few_are_val() -> None:
    texts = large_strings([f"{i:06d}" * 700 for i in range(2_000)])
    train, val = split_by_hash(texts, 0.005)
    held_out = {text for text in texts.to_pylist() if hashlib.sha256(text.encode()).digest()[:8] < SHARE_OF_0_005}
    assert val.to_pylist() == [text for text in texts.to_pylist() if text in held_out] and len(val) > 0
    assert train.to_pylist() == [text for text in texts.to_pylist() if text not in held_out]
    assert {chunk.buffers()[2].address for chunk in train.chunks} == {texts.chunk(0).buffers()[2].address}


def test_documents_begin_with_end_of_text(tokenizer_path: Path, documents: list[str]) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_path)
    expected = [id_ for text in ["", *documents, ""] for id_ in (tokenizer.eot_id, *tokenizer.encode(text))]
    assert encode_documents(tokenizer, large_strings(["", *documents], [""])).tolist() == expected
    assert len(encode_documents(tokenizer, large_strings([]))) == 0


# ---- crashes and resumes ---------------------------------------------------------------------------------------------


@pytest.fixture
def expected(config: TokenizeConfig, tmp_path: Path) -> dict[str, str]:
    """What an undisturbed run writes."""
    stages.tokenize(config, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def test_killed_worker(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, marker = stages.write, tmp_path / "killed once"

    def die(fd: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(row: pa.Table, **arguments: Any) -> Any:
        item = WorkItem.from_json(row["item"][0].as_py())
        if item.index == 2 and not marker.exists():
            marker.touch()
            os.fsync = die  # written, not yet renamed
        return write(row, **arguments)

    monkeypatch.setattr(stages, "write", dying_write)
    stages.tokenize(config, tmp_path / "out")
    assert marker.exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".tmp-")]
    monkeypatch.undo()
    (tmp_path / "out" / "manifest.json").unlink()
    assert stages.tokenize(config, tmp_path / "out").num_items_done == 0
    assert contents(tmp_path / "out") == expected


def test_worker_killed_every_time(config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, output = stages.encode, tmp_path / "out"

    def dying_encode(row: pa.Table, **arguments: Any) -> Any:
        if "item" in row.column_names and WorkItem.from_json(row["item"][0].as_py()).index == 1:
            attempts = output / "items" / ".tmp-attempts-encode-000001"
            assert attempts.read_bytes() == b"."
            attempts.write_bytes(b"." * ledger.MAX_ATTEMPTS)  # as if it had been killed before; a kill takes seconds
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(row, **arguments)

    monkeypatch.setattr(stages, "encode", dying_encode)
    assert "the task encode-000001 was killed 4 times, most likely for want of memory" in mistake(config, output)
    assert not (output / "manifest.json").exists()
    monkeypatch.undo()
    stages.tokenize(config, output)
    verify(output)


def test_interrupted_run_goes_on(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ItemProgress.add

    def interrupted_add(self: ItemProgress, *figures: int) -> None:
        add(self, *figures)
        if self._items == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ItemProgress, "add", interrupted_add)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stages.tokenize(dataclasses.replace(config, num_workers=1), output)
    monkeypatch.undo()
    assert stages.finished(config, output) is None
    done = {path.stem: path.stat().st_mtime_ns for path in (output / "items").glob("0*.json")}
    assert 2 <= len(done) < 5
    (output / ".tmp-train_000009.bin-0").write_bytes(b"half")
    (output / "items" / ".tmp-000009.json-0").write_bytes(b"half")
    summary = stages.tokenize(config, output)
    assert summary.num_items_done == 5 - len(done)
    assert contents(output) == expected
    assert {
        path.stem: path.stat().st_mtime_ns for path in (output / "items").glob("0*.json") if path.stem in done
    } == done


def test_finished_run_is_left_alone(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "undisturbed"
    assert stages.finished(config, tmp_path / "new") is None
    monkeypatch.setattr(ray.data, "from_items", None)
    assert stages.finished(dataclasses.replace(config, num_workers=7), output) == Manifest.load(output)
    assert stages.tokenize(config, output).num_items_done == 0
    assert contents(output) == expected


@pytest.mark.parametrize("lost", ["train_000001.bin", "items/000001.json", "tokenizer.json"])
def test_lost_files_are_made_again(config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, lost: str) -> None:
    output = tmp_path / "undisturbed"
    (output / lost).unlink()
    if not lost.startswith("items"):
        assert stages.finished(config, output) is None
    stages.tokenize(config, output)
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
    for function in (stages.finished, stages.tokenize):
        with pytest.raises(UserError, match=message):
            function(other, output)
    assert contents(output) == expected
    (output / "manifest.json").unlink()
    for function in (stages.finished, stages.tokenize):
        with pytest.raises(UserError, match=message):
            function(other, output)


def test_input_that_changes(config: TokenizeConfig, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "undisturbed"
    (corpus / "c.jsonl").write_text('{"text": "all new"}\n')
    for function in (stages.finished, stages.tokenize):
        with pytest.raises(UserError, match=r"c\.jsonl has changed in the source since output folder .* was begun"):
            function(config, output)
    assert contents(output) == expected
    (output / "manifest.json").unlink()
    summary = stages.tokenize(config, output)
    assert 0 < summary.num_items_done < summary.num_items
    again = stages.tokenize(config, tmp_path / "afresh")
    assert again.manifest == summary.manifest
    names = {path.name for path in output.glob("*.bin")}
    assert names == {entry.name for entry in summary.manifest.shards}
    (corpus / "d.txt").write_text("more")
    with pytest.raises(UserError, match=r"d\.txt is new in the source"):
        stages.finished(config, output)
    (corpus / "d.txt").unlink()
    (corpus / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"c\.jsonl is missing from the source"):
        stages.finished(config, output)


def test_mistake_in_a_task_is_one_sentence(config: TokenizeConfig, corpus: Path, tmp_path: Path) -> None:
    whole = (corpus / "c.jsonl").read_bytes()
    (corpus / "c.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "a\xff"}\n' + whole)
    output = tmp_path / "out"
    assert mistake(config, output) == f"line 2 of {corpus}/c.jsonl is not UTF-8 text: byte 11 is 0xff"
    assert not (output / "manifest.json").exists()
    assert all(len(open_shard(path)) for path in output.glob("*.bin"))
    (corpus / "c.jsonl").write_bytes(whole)
    stages.tokenize(config, output)
    verify(output)


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
        stages.tokenize(config, output)
        verify(output)
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
        stages.finished(config, tmp_path)


def test_folder_of_another_job(config: TokenizeConfig, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    training = TrainTokenizerConfig(source=str(corpus), vocab_size=320, num_workers=2)
    shards, mine = tmp_path / "undisturbed", tmp_path / "mine"
    with pytest.raises(UserError, match="was begun by another job, or by another version of this one; choose another"):
        tokenizer_training.train_tokenizer(dataclasses.replace(training, output=str(shards)))
    assert contents(shards) == expected
    tokenizer_training.train_into(training, mine)
    assert "was begun by another job" in mistake(config, mine)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="found holds files of unknown origin; choose another --output"):
        tokenizer_training.train_tokenizer(dataclasses.replace(training, output=str(tmp_path / "found")))
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["tokenizer.json"]


def test_no_document_at_all(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    empty = dataclasses.replace(config, source=str(tmp_path / "a.jsonl"))
    assert "a.jsonl holds no document that could be used (1 blank, 1 null)" in mistake(empty, tmp_path / "out")


# ---- hub -------------------------------------------------------------------------------------------------------------


def test_hub_source_stays_at_its_commit(
    config: TokenizeConfig, corpus: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in corpus.iterdir()}
    from_hub = dataclasses.replace(config, source=f"hf://datasets/{NAME}")
    output = tmp_path / "out"
    with running_hub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        stages.tokenize(from_hub, output)
        hub.push("b" * 40, {"other.txt": b"moved on"})
        (output / "train_000000.bin").unlink()
        assert stages.tokenize(from_hub, output).num_items_done == 1
    shards = {name: value for name, value in expected.items() if name.endswith(".bin")}
    assert {name: value for name, value in contents(output).items() if name.endswith(".bin")} == shards
    assert stages.finished(from_hub, output) == Manifest.load(output)  # the hub is gone
    assert {entry["version"].split()[0] for entry in Manifest.load(output).inputs} == {f"{NAME}@{'a' * 40}"}
