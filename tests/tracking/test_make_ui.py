"""``make ui``: the newest run of the store, and its page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline.storage.folders import open_folder
from pipeline.tracking import mlflow_ui
from pipeline.tracking.mlflow_run import open_run

ROOT = Path(__file__).resolve().parents[2]


def track(tmp_path: Path, name: str, job: str) -> str:
    folder = open_folder(tmp_path / name)
    run = open_run(tracking_uri=None, experiment="gpt-2.5", folder=folder, working_folder=tmp_path, job=job)
    return run.run_id


def test_the_newest_run_of_training_is_shown_before_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_ui.newest_run(uri) is None
    data = track(tmp_path, "data", "tokenize")
    found = mlflow_ui.newest_run(uri)
    assert found is not None and found.run_id == data
    trained = track(tmp_path, "run", "pretrain")
    track(tmp_path, "more-data", "tokenize")
    found = mlflow_ui.newest_run(uri)
    assert found is not None and found.run_id == trained
    page = mlflow_ui.page_of(found, "http://127.0.0.1:5000")
    assert page == (
        f"http://127.0.0.1:5000/#/experiments/{found.experiment_id}/runs/{trained}?workflowType=machine_learning"
    )
    assert mlflow_ui.page_of(None, "http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_the_server_starts_and_says_where_the_run_is(tmp_path: Path, free_tcp_port: int) -> None:
    track(tmp_path, "run", "pretrain")
    code = f"from pipeline.tracking import mlflow_ui; mlflow_ui.PORT = {free_tcp_port}; mlflow_ui.main()"
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        page = f"http://127.0.0.1:{free_tcp_port}/#/experiments/1/runs/"
        assert any(page in line for line in process.stderr), "the server has ended"
        with urllib.request.urlopen(f"http://127.0.0.1:{free_tcp_port}/") as answer:
            assert answer.status == 200
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
