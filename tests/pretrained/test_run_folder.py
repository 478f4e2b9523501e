"""A model's scores, curves and MLflow run are kept in its run folder, on a disk and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.inference import EvaluateConfig, ExportConfig
from pipeline.evaluation import evaluate_job
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.run_files import run_folder_of
from pipeline.storage.folders import Folder, open_folder
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_client, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.training.trainer import Trainer
from tests.support.models import ALONE, run_config
from tests.support.models import train as train_quietly
from tests.support.s3_server import S3


@pytest.mark.parametrize(
    ("address", "run"),
    [
        ("/data/runs/a/checkpoints/step-000040", "/data/runs/a"),
        ("/data/runs/a/checkpoints/step-1000000", "/data/runs/a"),
        ("s3://bucket/runs/a/checkpoints/step-000040", "s3://bucket/runs/a"),
        ("gs://bucket/checkpoints/step-000040/", "gs://bucket"),
        ("/data/runs/a", None),
        ("/data/checkpoints/copied", None),
        ("/data/a/checkpoints/step-000040.damaged", None),
        ("/home/me/.cache/gpt-2.5/checkpoints/0123456789abcdef0123", None),
    ],
)
def test_the_run_folder_of_an_address(address: str, run: str | None) -> None:
    assert run_folder_of(address) == run


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Where the run is written."""
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "disk":
        return open_folder(tmp_path / "runs" / "a")
    s3: S3 = request.getfixturevalue("s3")
    return open_folder(f"{s3.url}/runs/a")


def train(data: Path, folder: Folder, home: Path) -> MLflowRun:
    """A run that reports to MLflow's store in ``home``."""
    folder.make()
    run = open_run(tracking_uri=None, experiment="e", folder=folder, working_folder=home, job="pretrain")
    tracker = MLflowTracker(run, folder)
    Trainer(run_config(), data=open_folder(data), output=folder, workers=ALONE, tracker=tracker).run()
    return run


def test_scores_and_card_belong_to_the_run(folder: Folder, tiny_data: Path, tmp_path: Path) -> None:
    run = train(tiny_data, folder, tmp_path)
    checkpoint = f"{folder}/checkpoints/step-000040"
    source = resolve.resolve_model(str(folder))
    assert (source.address, source.run_folder) == (checkpoint, folder)
    assert source.path.is_dir() and resolve.resolve_model(checkpoint) == source

    config = EvaluateConfig(checkpoint=str(folder), device="cpu")
    scores = evaluate_job.evaluate(config)
    assert scores.checkpoint == checkpoint and scores.step == 40
    assert json.loads(folder.read("evaluation.json"))["val_loss"] == scores.val_loss
    assert not list((tmp_path / "cache").rglob("evaluation.json")), "nothing is left in the node's cache"
    assert evaluate_job.evaluate(config, reuse=True) == scores
    tags = mlflow_client(run.tracking_uri).get_run(run.run_id).data.tags
    assert (tags["eval/step"], float(tags["eval/val_loss"])) == ("40", scores.val_loss)

    report = export(ExportConfig(checkpoint=str(folder), output="exported"))
    assert report.source == checkpoint
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| val loss, whole val set | {scores.val_loss:.4f} |" in card
    assert "| step | train loss | val loss |" in card and "![" in card
    assert f"| MLflow run | `{run.run_id}` |" in card
    assert (tmp_path / "exported" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_shows_the_curves_up_to_its_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run")
    folder.make()
    run = MLflowRun(tracking_uri="http://127.0.0.1:9", experiment_id="1", run_id="r")  # a store that is away
    folder.write("mlflow_run.json", [json.dumps({"tracking_uri": run.tracking_uri, "run_id": run.run_id}).encode()])
    lines = [
        {"kind": "metrics", "time": 1000, "step": step, "values": {"train/loss": 5.0 - step / 100}}
        for step in (10, 20, 30, 40)
    ]
    train_quietly(tiny_data, tmp_path / "run", checkpoint_every=20, keep_checkpoints=3)
    folder.write("tracking.jsonl", ["".join(json.dumps(line) + "\n" for line in lines).encode()])
    export(ExportConfig(checkpoint=f"{folder}/checkpoints/step-000020", output=str(tmp_path / "exported")))
    card = (tmp_path / "exported" / "README.md").read_text()
    table = card.partition("| step | train loss | val loss |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == ["| 10 | 4.9000 |  |", "| 20 | 4.8000 |  |"]
    assert "| MLflow run | `r` |" in card, "the store is not asked"
