"""MLflow gets everything once and in order, whatever dies in between; a server that is away costs a warning."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking import journal, mlflow_tracker
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_uri, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker, send_waiting
from pipeline.tracking.tracker import RunInput
from tests.support.mlflow_server import free_port, serve, stop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_tracker, "_PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(mlflow_tracker, "_MOST_PERIOD_SECONDS", 0.2)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow without any run; to make one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    return copy_store(empty_store, tmp_path / "mlflow.db")


def copy_store(empty_store: Path, path: Path) -> str:
    shutil.copyfile(empty_store, path)
    return f"sqlite:///{path}"


def start(tmp_path: Path, uri: str | None, name: str = "run") -> MLflowRun:
    return open_run(
        tracking_uri=uri, experiment="exp", folder=open_folder(tmp_path / name), working_folder=tmp_path, job="pretrain"
    )


def track(run: MLflowRun, folder: Path, **settings: Any) -> MLflowTracker:
    return MLflowTracker(run, open_folder(folder), **settings)


def kill(tracker: MLflowTracker) -> None:
    """Nothing more is sent, as if the process were gone."""
    tracker.uploader.stop()
    tracker.uploader._thread.join(1200)
    assert not tracker.uploader._thread.is_alive()


def history(run: MLflowRun, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, name)
    return sorted((point.step, point.value) for point in points)


def log_everything(tracker: MLflowTracker, checkpoint: Path, steps: range = range(1, 4)) -> None:
    tracker.log_params({"lr": 0.1, "checkpoint": None})
    tracker.log_tags({"commit": "c0ffee"})
    docs: dict[str, Any] = {"source": "data/docs", "fingerprint": "a" * 64}
    tracker.log_inputs([RunInput(name=f"docs-{c}", context=c, **docs) for c in ("training", "validation")])
    for step in steps:
        tracker.log_metrics({"train/loss": 10.0 / step, "train/lr": 0.1}, step)
    last = steps[-1]
    tracker.log_sample(last, "Once", "Once upon")
    tracker.log_checkpoint(last, checkpoint, {"train_loss": 3.3})
    tracker.log_checkpoint(last, checkpoint, {"val_loss": 3.5}, best=True)


def check_everything(run: MLflowRun, checkpoint: Path, steps: range = range(1, 4)) -> None:
    client = MlflowClient(run.tracking_uri, registry_uri=run.tracking_uri)
    found = client.get_run(run.run_id)
    last = steps[-1]
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1", "checkpoint": "None"}
    assert history(run, "train/loss") == [(step, 10.0 / step) for step in steps]
    assert found.inputs is not None and found.outputs is not None
    inputs = sorted((i.dataset.name, i.dataset.digest) for i in found.inputs.dataset_inputs)
    assert inputs == [("docs-training", "a" * 36), ("docs-validation", "a" * 36)]
    assert found.data.tags["training_fingerprint"] == "a" * 64 and found.data.tags["commit"] == "c0ffee"
    artifacts = {artifact.path for artifact in client.list_artifacts(run.run_id)}
    assert {"samples.json", "curves.png", "report.html"} <= artifacts
    table = json.loads(Path(client.download_artifacts(run.run_id, "samples.json")).read_text())
    assert table == {"columns": ["step", "prompt", "text"], "data": [[last, "Once", "Once upon"]]}
    (model,) = client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'")
    assert (model.tags["checkpoint"], model.status.value) == (str(checkpoint), "READY")
    assert {(m.key, m.step, m.value) for m in model.metrics or []} == {
        ("checkpoint/train_loss", last, 3.3),
        ("checkpoint/val_loss", last, 3.5),
    }
    assert [output.model_id for output in found.outputs.model_outputs] == [model.model_id]
    version = client.get_model_version_by_alias("gpt", "best")
    assert version.run_id == run.run_id
    assert json.loads(client.get_logged_model(model.model_id).tags["mlflow.modelVersions"])[0]["name"] == "gpt"
    assert version.tags["checkpoint"] == str(checkpoint)
    assert len(client.search_model_versions(f"run_id = '{run.run_id}'")) == 1


def test_everything_is_there_afterwards(tmp_path: Path, store: str) -> None:
    run = start(tmp_path, store)
    tracker = track(run, tmp_path / "run", registered_model="gpt")
    log_everything(tracker, tmp_path / "step-000003")
    tracker.finish("FINISHED")
    check_everything(run, tmp_path / "step-000003")
    assert list((tmp_path / "mlartifacts").rglob("curves.png")), "artifacts lie in the working folder"
    assert journal.count_waiting(open_folder(tmp_path / "run"), run.run_id) == 0


def test_the_default_is_sqlite_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_uri(None, tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:1")
    assert mlflow_uri(None, tmp_path) == "http://host:1"
    assert mlflow_uri("http://other:1", tmp_path) == "http://other:1"


def test_a_restarted_run_goes_on_without_doubled_points(tmp_path: Path, store: str) -> None:
    first = start(tmp_path, store)
    tracker = track(first, tmp_path / "run")
    tracker.log_params({"lr": 0.1, "train_steps": 3})
    for step in (1, 2, 3):
        tracker.log_metrics({"train/loss": float(step)}, step)
    tracker.log_metrics({"val/loss": 9.0}, 2)
    tracker.log_sample(2, "a", "b")
    assert tracker.uploader.drain() == 0
    kill(tracker)  # the newest checkpoint is that of step 1
    second = start(tmp_path, store)
    assert second == first
    tracker = track(second, tmp_path / "run")
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


@pytest.mark.parametrize("lost", ["nothing", "the note of what was sent", "the journal too"])
def test_what_was_sent_but_not_noted_is_not_doubled(tmp_path: Path, store: str, lost: str) -> None:
    run, folder, checkpoint = start(tmp_path, store), tmp_path / "run", tmp_path / "step-000003"
    tracker = track(run, folder, registered_model="gpt")
    log_everything(tracker, checkpoint)
    assert tracker.uploader.drain() == 0
    kill(tracker)
    if lost != "nothing":
        (folder / "tracking_sent.json").unlink()
    if lost == "the journal too":
        (folder / "tracking.jsonl").unlink()
    tracker = track(start(tmp_path, store), folder, registered_model="gpt")
    log_everything(tracker, checkpoint)  # the steps are done again
    tracker.finish("FINISHED")
    check_everything(run, checkpoint)


def test_the_whole_history_goes_to_a_store_that_lost_it(tmp_path: Path, store: str, empty_store: Path) -> None:
    tracker = track(start(tmp_path, store), tmp_path / "run")
    log_everything(tracker, tmp_path / "step-000003", range(1, 6))
    tracker.finish("FAILED")
    run = start(tmp_path, copy_store(empty_store, tmp_path / "other.db"))
    tracker = track(run, tmp_path / "run", registered_model="gpt")
    tracker.finish("FINISHED")
    check_everything(run, tmp_path / "step-000003", range(1, 6))


def test_the_alias_stays_with_the_better_run_on_the_same_data(tmp_path: Path, store: str) -> None:
    client = MlflowClient(store)

    def best(name: str, step: int, val_loss: float, data: str = "a") -> str:
        tracker = track(start(tmp_path, store, name), tmp_path / name, registered_model="gpt")
        tracker.log_inputs([RunInput(name="d", fingerprint=data * 64, source="d", context="validation")])
        tracker.log_checkpoint(step, tmp_path / f"{name}-{step}", {"val_loss": val_loss}, best=True)
        tracker.close()
        return str(client.get_model_version_by_alias("gpt", "best").tags["checkpoint"]).rpartition("/")[2]

    assert best("one", 10, 3.0) == "one-10"
    assert best("one", 20, 2.9) == "one-20"
    assert best("two", 10, 3.5) == "one-20", "another run's best is worse"
    assert best("two", 30, 2.8) == "two-30"
    assert best("three", 10, 9.0, data="b") == "three-10", "losses on other data cannot be compared"
    kept = {version.tags["checkpoint"].rpartition("/")[2] for version in client.search_model_versions("name = 'gpt'")}
    assert kept == {"one-20", "two-30", "three-10"}, "each run has its best alone"


def test_what_the_store_refuses_is_left_out_with_a_warning(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tmp_path, store)
    tracker = track(run, tmp_path / "run")
    tracker.log_tags({"x" * 300: "a name that is too long"})
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.log_file(tmp_path / "run" / "absent.txt")
    tracker.log_metrics({"train/loss": 2.0}, 2)
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert history(run, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert [r.message.split(" (")[0] for r in caplog.records] == ["MLflow refuses an entry"] * 2


def test_a_store_that_does_not_answer_at_the_first_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer") as caught:
        start(tmp_path, "http://somebody:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "_IDLE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "run").mkdir()
        tracker = track(MLflowRun(tracking_uri=uri, experiment_id="1", run_id="r"), tmp_path / "run")
        for step in range(1, 4):
            tracker.log_metrics({"train/loss": 1.0, "train/lr": 1.0}, step)
        tracker.flush()
        tracker.finish("KILLED")
    assert journal.count_waiting(open_folder(tmp_path / "run"), "r") == 7  # six points and the status


def test_passwords_stay_out_of_sight(tmp_path: Path, store: str) -> None:
    address = "postgresql://somebody:secret@host:5432/mlflow"
    assert "secret" not in MLflowRun(tracking_uri=address, experiment_id="1", run_id="r").location
    assert to_dict(PretrainConfig(tracking_uri=address))["tracking_uri"] == "postgresql://host:5432/mlflow"
    tracker = track(start(tmp_path, store), tmp_path / "run")
    tracker.log_params({"data": "https://me:secret@host/data"})
    tracker.log_inputs([RunInput(name="d", fingerprint="a", source="https://me:secret@host/d", context="training")])
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finish("FINISHED")
    contents = contents_of(tmp_path / "run")
    assert "tracking.jsonl" in contents
    assert not [name for name, content in contents.items() if b"secret" in content]


def contents_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file; files may still be written and renamed."""
    while True:
        try:
            return {file.name: file.read_bytes() for file in folder.iterdir()}
        except FileNotFoundError:
            continue


def test_a_run_that_the_store_forgot_gets_a_new_one(tmp_path: Path, store: str, empty_store: Path) -> None:
    first = start(tmp_path, store)
    assert start(tmp_path, store) == first
    copy_store(empty_store, tmp_path / "mlflow.db")
    assert start(tmp_path, store).run_id != first.run_id


DYING = """
import os, signal, sys
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.storage.folders import open_folder
uri, experiment, run, folder = sys.argv[1:]
tracker = MLflowTracker(MLflowRun(tracking_uri=uri, experiment_id=experiment, run_id=run), open_folder(folder))
for step in range(6, 9):
    tracker.log_metrics({"train/loss": 10.0 / step, "train/lr": 0.1}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_server_and_then_the_run_are_killed_and_nothing_is_lost_or_doubled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, folder, checkpoint = free_port(), tmp_path / "run", tmp_path / "step-000003"
    place = (f"sqlite:///{tmp_path / 'server.db'}", tmp_path / "artifacts", port)
    with serve(*place) as (url, process):
        run = start(tmp_path, url)
        first = track(run, folder, registered_model="gpt")
        for step in (1, 2):
            first.log_metrics({"train/loss": 10.0 / step, "train/lr": 0.1}, step)
        assert first.uploader.drain() == 0
        stop(process)
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking.mlflow_tracker"):
        for step in (3, 4, 5):
            first.log_metrics({"train/loss": 10.0 / step, "train/lr": 0.1}, step)
        assert first.uploader.drain() == 6
        kill(first)
        assert "does not answer" in caplog.text and "the run goes on" in caplog.text
        assert start(tmp_path, url) == run, "a restart goes on without the server"
    command = [sys.executable, "-c", DYING, url, run.experiment_id, run.run_id, str(folder)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=1200).returncode == -9
    last = track(start(tmp_path, url), folder, registered_model="gpt")
    log_everything(last, checkpoint, range(4, 11))
    last.finish("FINISHED")
    trained = time.time()
    waiting = journal.count_waiting(open_folder(folder), run.run_id)
    assert waiting >= 2 * 8 + 8  # eight steps of two metrics, and the rest of what there is to tell
    with serve(*place):
        assert start(tmp_path, url) == run
        send_waiting(run, open_folder(folder), "gpt")  # what the same command does
        assert journal.count_waiting(open_folder(folder), run.run_id) == 0
        points = MlflowClient(url).get_metric_history(run.run_id, "train/loss")
        assert [(p.step, p.value) for p in points] == [(step, 10.0 / step) for step in range(1, 11)]
        assert [p.timestamp for p in points] == sorted(p.timestamp for p in points), "the times are those of training"
        assert points[-1].timestamp <= trained * 1000
        MlflowClient(url).log_metric(run.run_id, "still", 1.0)
        check_server_side(run, checkpoint)


def check_server_side(run: MLflowRun, checkpoint: Path) -> None:
    client = MlflowClient(run.tracking_uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert client.get_model_version_by_alias("gpt", "best").tags["checkpoint"] == str(checkpoint)
    assert {"samples.json", "curves.png", "report.html"} <= {a.path for a in client.list_artifacts(run.run_id)}
