"""jobs/evaluate.py: one result for a checkpoint, its export and several workers; bits per byte by definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config.inference import EvaluateConfig, ExportConfig
from pipeline.dataset.shards import open_split
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from tests.support.hellaswag_questions import write_questions
from tests.support.models import train


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "val.jsonl", 20)


def test_everything_at_once(checkpoint: Path, tiny_data: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    config = EvaluateConfig(checkpoint=str(checkpoint), hellaswag=str(questions), output=str(output), device="cpu")
    result = evaluate_job.evaluate(config)
    stream = open_split(tiny_data, "val")
    assert result.val_tokens == len(stream) - 1 and result.hellaswag_questions == 20
    found = resolve.open_model(checkpoint, torch.device("cpu"))
    ids = [int(token) for token in stream.read(0, len(stream))]
    num_bytes = sum(len(found.tokenizer.decode_bytes([token])) for token in ids[1:] if token != found.tokenizer.eot_id)
    assert result.val_loss is not None and result.bits_per_byte is not None
    assert result.bits_per_byte == pytest.approx(result.val_loss * (len(ids) - 1) / math.log(2) / num_bytes)
    written = json.loads(output.read_text())
    assert written == json.loads((checkpoint.parents[1] / "evaluation.json").read_text())
    assert written["perplexity"] == pytest.approx(math.exp(result.val_loss)) and written["step"] == 40
    again = evaluate_job.evaluate(config, reuse=True)
    assert again == result


def test_an_exported_folder_scores_the_same(checkpoint: Path, tiny_data: Path, questions: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "folder")))
    settings = {"hellaswag": str(questions), "data": str(tiny_data), "device": "cpu"}
    ours = evaluate_job.evaluate(EvaluateConfig(checkpoint=str(checkpoint), **settings))  # type: ignore[arg-type]
    theirs = evaluate_job.evaluate(EvaluateConfig(checkpoint=str(tmp_path / "folder"), **settings))  # type: ignore[arg-type]
    assert theirs.figures() == ours.figures() and theirs.tokens_seen == ours.tokens_seen
    alone = evaluate_job.evaluate(
        EvaluateConfig(checkpoint=str(tmp_path / "folder"), hellaswag=str(questions), device="cpu")
    )
    assert alone.val_loss is None and alone.hellaswag_acc == ours.hellaswag_acc


def test_what_cannot_be_measured_is_one_sentence(checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "folder")))
    with pytest.raises(UserError, match="give --data or --hellaswag"):
        evaluate_job.evaluate(EvaluateConfig(checkpoint=str(tmp_path / "folder")))
    with pytest.raises(UserError, match="there are no HellaSwag questions at"):
        evaluate_job.evaluate(EvaluateConfig(checkpoint=str(checkpoint), hellaswag=str(tmp_path / "absent.jsonl")))


@pytest.mark.slow
def test_two_workers_find_the_same(
    checkpoint: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"checkpoint": str(checkpoint), "hellaswag": str(questions), "device": "cpu", "batch_size": 4}
    alone = evaluate_job.evaluate(EvaluateConfig(**settings))  # type: ignore[arg-type]
    together = evaluate_job.evaluate(EvaluateConfig(**settings, num_workers=2))  # type: ignore[arg-type]
    for name, value in alone.figures().items():
        assert together.figures()[name] == pytest.approx(value, rel=1e-5), name  # float32 sums in another order


def test_the_report_of_a_finished_run_is_renewed(tiny_data: Path, tmp_path: Path) -> None:
    """The page and MLflow's copy of it show the scores of an evaluation made afterwards."""
    folder = open_folder(tmp_path / "run")
    path = train(tiny_data, tmp_path / "run")
    run = open_run(tracking_uri=None, experiment="gpt-2.5", folder=folder, working_folder=tmp_path, job="pretrain")
    tracker = MLflowTracker(run, folder)
    tracker.log_metrics({"train/loss": 3.0}, 1)
    tracker.finish("FINISHED")
    assert "whole val set" not in folder.read("report.html").decode()
    config = EvaluateConfig(checkpoint=str(path), device="cpu", tracking_uri=run.tracking_uri)
    result = evaluate_job.evaluate(config)
    assert result.val_loss is not None
    row = f"{result.val_loss:.4f} on {result.val_tokens:,} tokens"
    assert row in folder.read("report.html").decode()
    copies = [path.read_text() for path in (tmp_path / "mlartifacts").rglob("report.html")]
    assert len(copies) == 1 and row in copies[0]
