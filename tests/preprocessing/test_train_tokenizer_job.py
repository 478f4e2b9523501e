"""A tokenizer trained on a real local Ray: equal to one trained without, found when it is there, mistakes refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow import MlflowClient

from pipeline.config.data import TrainTokenizerConfig
from pipeline.errors import UserError
from pipeline.preprocessing import resume_state, train_tokenizer_job
from pipeline.preprocessing.encode_documents import split_by_hash
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.fixtures import contents

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def training(corpus: Path) -> TrainTokenizerConfig:
    return TrainTokenizerConfig(source=str(corpus), vocab_size=320, item_bytes=12_000, num_workers=2)


def test_tokenizer_does_not_depend_on_workers_and_items(
    training: TrainTokenizerConfig, documents: list[str], tmp_path: Path
) -> None:
    expected = bpe_training.train_bpe(documents, 320)
    for num_workers, item_bytes in [(1, 12_000), (2, 2_000), (4, 10**9)]:
        output = tmp_path / f"{num_workers}"
        config = dataclasses.replace(training, num_workers=num_workers, item_bytes=item_bytes)
        report = train_tokenizer_job.train_into(config, open_folder(output))
        saved = Tokenizer.from_file(output / "tokenizer.json")
        assert saved.fingerprint == report.fingerprint == expected.fingerprint
        assert (report.documents, report.skipped) == (len(documents), {"blank": 1, "null": 1})
        assert report.text_megabytes == sum(len(text.encode()) for text in documents) / 1e6
        assert report.distinct_pretokens == bpe_training.count_pretokens(documents).table.num_rows
        assert (report.merges, report.vocab_size) == (63, 320)
        assert not list(output.rglob(".tmp-*"))


def test_tokenizer_of_all_settings(training: TrainTokenizerConfig, documents: list[str], tmp_path: Path) -> None:
    special_tokens = ("<|endoftext|>", "<|pad|>")
    config = dataclasses.replace(
        training, special_tokens=special_tokens, min_frequency=40, val_fraction=0.2, pattern="cl100k", vocab_size=5000
    )
    report = train_tokenizer_job.train_into(config, open_folder(tmp_path))
    train, val = split_by_hash(pa.chunked_array([documents], pa.large_string()), 0.2)
    expected = bpe_training.train_bpe(train, 5000, special_tokens, min_frequency=40, pattern="cl100k")
    assert report.fingerprint == expected.fingerprint
    assert report.vocab_size == expected.vocab_size == 258 + report.merges < 5000
    assert report.documents == len(train) == len(documents) - len(val)


def test_trained_before(
    training: TrainTokenizerConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = dataclasses.replace(training, source="corpus", output="out")
    report, run, was_there = train_tokenizer_job.train_tokenizer(config)
    before = contents(tmp_path / "out")
    assert not was_there
    logged = MlflowClient(run.tracking_uri).get_run(run.run_id)
    assert logged.data.params["vocab_size"] == "320" and logged.data.tags["job"] == "train_tokenizer"
    assert logged.data.tags["tokenizer_fingerprint"] == report.fingerprint and "data_fingerprint" in logged.data.tags
    figures = {"documents", "text_megabytes", "distinct_pretokens", "merges", "count_seconds", "merge_seconds"}
    assert figures < logged.data.tags.keys() and logged.data.tags["vocab_size"] == "320"
    assert not logged.data.metrics, "MLflow draws a chart of each"
    assert [file.path for file in MlflowClient(run.tracking_uri).list_artifacts(run.run_id)] == ["tokenizer.json"]

    monkeypatch.setattr(train_tokenizer_job, "learn", None)  # nothing is trained from here on
    again = train_tokenizer_job.train_tokenizer(dataclasses.replace(config, num_workers=1, item_bytes=5))
    assert again == (report, run, True)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"min_frequency": 2}, "was begun with min_frequency 1, not 2; delete it or choose another --output"),
        ({"special_tokens": ("<x>",)}, "was begun with special_tokens ['<|endoftext|>'], not ['<x>']"),
        ({"sample_bytes": 9}, "was begun with sample_bytes 1000000000, not 9"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=re.escape(message)):
            train_tokenizer_job.train_tokenizer(dataclasses.replace(config, **change))
    (corpus / "d.txt").write_text("more")
    with pytest.raises(UserError, match=r"d\.txt is new in the source since output folder .* was begun"):
        train_tokenizer_job.train_tokenizer(config)
    assert contents(tmp_path / "out") == before


def test_training_that_stopped_before_its_summary_begins_again(
    training: TrainTokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_tokenizer_job.train_into(training, open_folder(tmp_path / "whole"))
    folder = open_folder(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer_job, "report_json", raise_interrupt)
        train_tokenizer_job.train_into(training, folder)
    settings_used = train_tokenizer_job._settings_of(training)
    names = ("tokenizer.json", "summary.json")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not resume_state.is_complete(folder, training.source, settings_used, names=names)
    again = train_tokenizer_job.train_into(training, folder)
    assert again.fingerprint == expected.fingerprint
    assert resume_state.is_complete(folder, training.source, settings_used, names=names)


def raise_interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
