"""The embedded store lies in the working folder, whatever its name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import find_run, mlflow_client, open_run


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@pytest.mark.parametrize("name", ["feature%2Fx", "what?now", "a#b", "100%", "%(x)s é", "x@y:z&u=1;", "plain"])
def test_a_working_folder_of_any_name(tmp_path: Path, name: str) -> None:
    working = tmp_path / "all" / name
    working.mkdir(parents=True)
    folder = open_folder(working / "data")
    run = open_run(tracking_uri=None, experiment="e", folder=folder, working_folder=working, job="tokenize")
    assert run.tracking_uri == f"sqlite:///{working}/mlflow.db" or name != "plain"  # as in the records of old folders
    client: MlflowClient = mlflow_client(run.tracking_uri)
    client.log_text(run.run_id, "a text", "a.txt")
    assert find_run(tracking_uri=None, folder=folder, working_folder=working) == run
    assert sorted(path.name for path in working.iterdir()) == ["data", "mlartifacts", "mlflow.db"]
    assert [path.read_text() for path in working.rglob("a.txt")] == ["a text"]
    assert [path.name for path in (tmp_path / "all").iterdir()] == [name]  # nothing is written beside it
