"""jobs/tokenize.py with rules, masking, near-duplicates and decontamination at once, on a real local Ray: what stays,
for any number of workers, and through a kill in every stage."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.deduplication import near
from pipeline.preprocessing import duplicates, resume_state, stages, tokenization
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from tests.preprocessing.test_filters import documents_of
from tests.support.fixtures import contents
from tests.support.planted_corpus import PlantedCorpus, planted_corpus

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def corpus() -> PlantedCorpus:
    return planted_corpus()


@pytest.fixture(scope="module")
def config(corpus: PlantedCorpus, tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    folder = tmp_path_factory.mktemp("planted")
    config = corpus.write(folder)
    bpe_training.train_bpe(corpus.texts, 300).save(folder / "tokenizer.json")
    return dataclasses.replace(config, tokenizer=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def expected(config: TokenizeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes, with two workers."""
    output = tmp_path_factory.mktemp("undisturbed")
    tokenization.tokenize(config, open_folder(output))
    return contents(output)


def test_each_stage_takes_what_is_its_own(config: TokenizeConfig, corpus: PlantedCorpus, tmp_path: Path) -> None:
    report = tokenization.tokenize(config, open_folder(tmp_path))
    assert documents_of(tmp_path) == corpus.kept
    manifest = Manifest.load(tmp_path)
    assert manifest.skipped == report.skipped == corpus.skipped
    assert report.num_items >= 6
    lines = [json.loads(line) for line in (tmp_path / "contaminated.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [question for _, question in corpus.listed]
    assert [line["question_id"] for line in lines] == [f"q{question - 1}" for _, question in corpus.listed]
    assert tokenization.finished(config, open_folder(tmp_path)) == manifest


def test_one_two_and_four_workers(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one partition of the keys and with several."""
    for workers in (1, 4):
        monkeypatch.setattr(near, "_KEYS_PER_PARTITION", 400 // workers)
        tokenization.tokenize(dataclasses.replace(config, num_workers=workers), open_folder(tmp_path / str(workers)))
        assert contents(tmp_path / str(workers)) == expected


# ---- kills -----------------------------------------------------------------------------------------------------------

MODULES: dict[str, Any] = {
    "sign_documents": duplicates,
    "pair_documents": duplicates,
    "join_pairs": duplicates,
    "encode": stages,
    "write": stages,
}


@pytest.mark.parametrize(
    "stage",
    ["write", *(pytest.param(stage, marks=pytest.mark.slow) for stage in MODULES if stage != "write")],
)
def test_killed_in_each_stage(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A worker is killed when a task has written or encoded, the run is ended a task later, and the same command goes
    on: with the same shards, list and manifest."""
    output, killed, stopped = tmp_path / "out", tmp_path / "killed", tmp_path / "stopped"
    undisturbed = getattr(MODULES[stage], stage)

    def disturbed(table: pa.Table, **arguments: Any) -> Iterator[pa.Table]:
        for result in undisturbed(table, **arguments):
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if not stopped.exists():
                stopped.touch()
                raise ValueError("stopped")
            yield result

    monkeypatch.setattr(near, "_KEYS_PER_PARTITION", 400)
    with monkeypatch.context() as patch:
        patch.setattr(MODULES[stage], stage, disturbed)
        with pytest.raises(Exception, match="stopped"):
            tokenization.tokenize(config, open_folder(output))
    assert killed.exists() and stopped.exists() and not (output / "manifest.json").exists()
    tokenization.tokenize(config, open_folder(output))
    assert contents(output) == expected


PLACES: dict[str, tuple[Any, str]] = {
    "questions read": (resume_state, "begin"),
    "all encoded": (tokenization.decontamination, "join_lists"),
    "questions listed": (duplicates, "remove_files"),
    "copies' files removed": (Manifest, "save"),
}


@pytest.mark.slow
@pytest.mark.parametrize("last", PLACES)
def test_the_driver_ends_between_the_stages(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Behind the last thing that it has done."""
    output = open_folder(tmp_path)

    def ended(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[last], ended)
        with pytest.raises(KeyboardInterrupt):
            tokenization.tokenize(config, output)
    assert tokenization.finished(config, output) is None
    tokenization.tokenize(config, output)
    assert contents(tmp_path) == expected
