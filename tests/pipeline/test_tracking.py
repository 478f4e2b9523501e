"""MLflow gets everything once, a restarted run goes on in its own run, a dead server costs a warning."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config import PretrainConfig, to_dict
from pipeline.errors import UserError
from pipeline.storage import open_folder
from pipeline.tracking import MLflowRun, MLflowTracker, RunInput, open_run
from tests.pipeline.mlflow_server import stop


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def start(tmp_path: Path, uri: str | None, name: str = "run") -> MLflowRun:
    return open_run(
        tracking_uri=uri, experiment="exp", folder=open_folder(tmp_path / name), working_folder=tmp_path, job="pretrain"
    )


def history(run: MLflowRun, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, name)
    return sorted((point.step, point.value) for point in points)


def everything(tracker: MLflowTracker, checkpoint: Path) -> None:
    tracker.log_params({"lr": 0.1, "checkpoint": None})
    tracker.log_inputs([RunInput(name="docs", fingerprint="a" * 64, source="data/docs", context="training")])
    for step in (1, 2, 3):
        tracker.log_metrics({"train/loss": 10.0 / step, "train/lr": 0.1}, step)
    tracker.log_sample(3, "Once", "Once upon")
    tracker.log_checkpoint(3, checkpoint, {"train_loss": 3.3})
    tracker.finish("FINISHED")


def check_everything(run: MLflowRun, checkpoint: Path) -> None:
    client = MlflowClient(run.tracking_uri)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1", "checkpoint": "None"}
    assert history(run, "train/loss") == [(1, 10.0), (2, 5.0), (3, 10 / 3)]
    assert [(i.dataset.name, i.dataset.digest) for i in found.inputs.dataset_inputs] == [("docs", "a" * 36)]
    assert found.data.tags["training_fingerprint"] == "a" * 64
    artifacts = {artifact.path for artifact in client.list_artifacts(run.run_id)}
    assert {"samples.json", "curves.png"} <= artifacts
    (model,) = client.search_logged_models([run.experiment_id])
    assert model.tags["checkpoint"] == str(checkpoint)
    assert [(metric.key, metric.step) for metric in model.metrics] == [("checkpoint/train_loss", 3)]


def test_everything_is_there_afterwards(tmp_path: Path, store: str) -> None:
    run = start(tmp_path, store)
    everything(MLflowTracker(run), tmp_path / "step-000003")
    check_everything(run, tmp_path / "step-000003")
    assert list((tmp_path / "mlartifacts").rglob("curves.png")), "artifacts lie in the working folder"


def test_the_default_is_sqlite_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert start(tmp_path, None).tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert start(tmp_path, None, "second").tracking_uri == f"sqlite:///{tmp_path / 'other.db'}"


def test_a_restarted_run_goes_on_without_doubled_points(tmp_path: Path, store: str) -> None:
    first = start(tmp_path, store)
    tracker = MLflowTracker(first)
    tracker.log_params({"lr": 0.1, "train_steps": 3})
    for step in (1, 2, 3):
        tracker.log_metrics({"train/loss": float(step)}, step)
    tracker.log_metrics({"val/loss": 9.0}, 2)
    tracker.log_sample(2, "a", "b")
    tracker.flush()  # and then it was killed; the newest checkpoint is that of step 1
    second = start(tmp_path, store)
    assert second == first
    tracker = MLflowTracker(second)
    tracker.log_params({"lr": 0.1, "train_steps": 4})
    for step in (2, 3, 4):
        tracker.log_metrics({"train/loss": float(step)}, step)
    tracker.log_metrics({"val/loss": 9.0}, 2)
    tracker.log_metrics({"val/loss": 8.0}, 4)
    tracker.log_sample(2, "a", "b")
    tracker.log_sample(4, "a", "c")
    tracker.finish("FINISHED")
    assert history(second, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(second, "val/loss") == [(2, 9.0), (4, 8.0)]
    samples = json.loads(next((tmp_path / "mlartifacts").rglob("samples.json")).read_text())
    assert [row[0] for row in samples["data"]] == [2, 4]
    found = MlflowClient(store).get_run(second.run_id)
    assert found.data.params["train_steps"] == "3" and found.data.tags["resumed.train_steps"] == "4"


def test_a_store_that_does_not_answer_at_the_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer") as caught:
        start(tmp_path, "http://somebody:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_passwords_of_the_store_stay_out_of_sight(tmp_path: Path) -> None:
    address = "postgresql://somebody:secret@host:5432/mlflow"
    assert "secret" not in MLflowRun(tracking_uri=address, experiment_id="1", run_id="r").location
    assert to_dict(PretrainConfig(tracking_uri=address))["tracking_uri"] == "postgresql://host:5432/mlflow"


def test_a_run_that_the_store_forgot_gets_a_new_one(tmp_path: Path, store: str) -> None:
    first = start(tmp_path, store)
    (tmp_path / "mlflow.db").unlink()
    other = f"sqlite:///{tmp_path / 'new.db'}"
    assert start(tmp_path, other).run_id != first.run_id


def test_a_real_server_gets_the_same_and_its_death_is_survived(
    tmp_path: Path,
    mlflow_server: tuple[str, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, process = mlflow_server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = start(tmp_path, url)
    everything(MLflowTracker(run), tmp_path / "step-000003")
    check_everything(run, tmp_path / "step-000003")

    tracker = MLflowTracker(start(tmp_path, url, "other"))
    tracker.log_metrics({"train/loss": 1.0}, 1)
    stop(process)
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        tracker.log_metrics({"train/loss": 2.0}, 2)
        tracker.flush()
        tracker.log_checkpoint(2, tmp_path, {})
        tracker.finish("FINISHED")
    assert "MLflow did not take the metrics" in caplog.text
