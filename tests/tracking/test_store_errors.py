"""A store that takes nothing: what it is, and the cure, told apart; what a deleted experiment refuses is kept."""

from __future__ import annotations

import http.server
import json
import logging
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking import mlflow_run, mlflow_tracker
from pipeline.tracking.journal import count_waiting
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_uri, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker, send_waiting
from tests.support.mlflow_server import behind_proxy, serve

UNSET = "or unset MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(mlflow_run, "_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(mlflow_tracker, "_PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(mlflow_tracker, "_MOST_PERIOD_SECONDS", 0.2)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """Starts a web server that answers everything alike; gives its address."""
    servers = []

    def start(status: int, body: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *values: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def start(tmp_path: Path, uri: str | None, name: str = "run", experiment: str = "exp") -> MLflowRun:
    folder = open_folder(tmp_path / name)
    return open_run(tracking_uri=uri, experiment=experiment, folder=folder, working_folder=tmp_path, job="pretrain")


def sentence(tmp_path: Path, uri: str) -> str:
    """What the first start of a run says of a store that takes nothing."""
    with pytest.raises(UserError) as caught:
        start(tmp_path, uri)
    return str(caught.value)


HTML = b"<html>nope</html>"
DENIED = b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'


@pytest.mark.parametrize(
    ("answer", "what", "cure"),
    [
        ((401, HTML), "wants to know who asks", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ((403, HTML), "does not allow it", "ask those who run it"),
        ((403, DENIED), "does not allow it (PERMISSION_DENIED: Permission denied)", "ask those who run it"),
        ((404, HTML), "is a web server without MLflow under this path", "with its path prefix"),
        ((301, HTML), "is a web server without MLflow under this path", "with its path prefix"),
        ((200, HTML), "is a web server without MLflow under this path", "with its path prefix"),
        ((500, HTML), "answers with errors (500)", "read the server's log"),
        ((503, HTML), "answers with errors (503)", "read the server's log"),
        ((429, HTML), "answers with errors (429)", "read the server's log"),
    ],
)
def test_what_a_web_server_answers_is_told_apart(
    answering: Callable[[int, bytes], str], tmp_path: Path, answer: tuple[int, bytes], what: str, cure: str
) -> None:
    url = answering(*answer)
    said = sentence(tmp_path, url)
    assert said.startswith(f"MLflow at {url} {what}") and cure in said and "does not answer" not in said


def test_refused_away_and_unknown_are_told_apart(tmp_path: Path, answering: Callable[[int, bytes], str]) -> None:
    assert "does not answer: nothing listens there, the connection is refused; start it" in sentence(
        tmp_path, "http://me:secret@127.0.0.1:9"
    )
    assert "no host of that name is known; correct the name" in sentence(tmp_path, "http://nohost.invalid:5000")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = sentence(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "does not answer: it is away, or hangs" in said and UNSET in said
    plain = answering(200, b"{}").replace("http:", "https:")
    assert "does not answer over TLS" in (said := sentence(tmp_path, plain)) and "write http://" in said


def test_a_database_that_cannot_be_used_is_told_apart(tmp_path: Path, store: str) -> None:
    path = tmp_path / "mlflow.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    said = sentence(tmp_path, store)
    holder.close()
    assert "is locked by another program" in said and f"fuser {path} names it" in said
    start(tmp_path, store)
    (tmp_path / "junk.db").write_text("no database at all " * 100)
    assert "holds something else; move the file away" in sentence(tmp_path, f"sqlite:///{tmp_path}/junk.db")
    assert "is a folder" in sentence(tmp_path, f"sqlite:///{tmp_path}")


def test_addresses_that_are_none_are_told_apart(tmp_path: Path) -> None:
    assert "write http://127.0.0.1:5000" in sentence(tmp_path, "127.0.0.1:5000")
    assert "give http://HOST:PORT or sqlite:///PATH" in sentence(tmp_path, "ftp://host/path")
    for files in ("./mlruns", "mlruns", "file:mlruns", f"file://{tmp_path}/mlruns"):
        said = sentence(tmp_path, files)
        assert "mlflow migrate-filestore" in said and "MLFLOW_ALLOW_FILE_STORE=true" in said and "start it" not in said


def test_a_driver_of_a_database_that_is_missing_is_named(tmp_path: Path) -> None:
    said = sentence(tmp_path, "mssql+nodriver://host/x")
    assert "Traceback" not in said and said.startswith("MLflow at mssql+nodriver://host/x ")


def test_a_deleted_experiment_is_named_and_nothing_is_lost(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, client = start(tmp_path, store), MlflowClient(store)
    folder = open_folder(tmp_path / "run")
    tracker = MLflowTracker(run, folder)
    tracker.log_metrics({"train/loss": 3.0}, 1)
    assert tracker.uploader.drain() == 0
    client.delete_experiment(run.experiment_id)
    tracker.log_metrics({"train/loss": 2.0}, 2)
    tracker.log_sample(2, "a", "b")
    with caplog.at_level(logging.WARNING):
        tracker.finish("KILLED")
    restore = f"mlflow experiments restore --experiment-id {run.experiment_id}"
    assert f"has deleted the experiment {run.experiment_id}; restore it" in caplog.text and restore in caplog.text
    assert "left out" not in caplog.text and count_waiting(folder, run.run_id) == 3
    assert "has deleted the experiment" in sentence_of_another_run(tmp_path, store)
    caplog.clear()
    assert start(tmp_path, store) == run
    assert "has deleted the experiment" in caplog.text and "the run goes on without it" in caplog.text
    client.restore_experiment(run.experiment_id)
    send_waiting(start(tmp_path, store), folder)
    points = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 3.0), (2, 2.0)]
    assert count_waiting(folder, run.run_id) == 0


def sentence_of_another_run(tmp_path: Path, store: str) -> str:
    with pytest.raises(UserError, match="or give another --experiment") as caught:
        start(tmp_path, store, "another")
    return str(caught.value)


def test_with_another_experiment_the_history_goes_there(tmp_path: Path, store: str) -> None:
    run, client = start(tmp_path, store), MlflowClient(store)
    tracker = MLflowTracker(run, open_folder(tmp_path / "run"))
    tracker.log_metrics({"train/loss": 3.0}, 1)
    tracker.finish("KILLED")
    client.delete_experiment(run.experiment_id)
    other = start(tmp_path, store, experiment="other")
    send_waiting(other, open_folder(tmp_path / "run"))
    assert [point.value for point in client.get_metric_history(other.run_id, "train/loss")] == [3.0]


def test_a_run_deleted_while_it_trains_is_named_and_kept(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, client = start(tmp_path, store), MlflowClient(store)
    tracker = MLflowTracker(run, open_folder(tmp_path / "run"))
    client.delete_run(run.run_id)
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics({"train/loss": 3.0}, 1)
        tracker.finish("KILLED")
    assert f"has deleted the run {run.run_id}; restore it" in caplog.text
    assert count_waiting(open_folder(tmp_path / "run"), run.run_id) == 2
    again = start(tmp_path, store)
    send_waiting(again, open_folder(tmp_path / "run"))
    assert [point.value for point in client.get_metric_history(again.run_id, "train/loss")] == [3.0]


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{home}/mlflow.db"),
        ("sqlite:///sub/m.db?timeout=9", "sqlite:///{home}/sub/m.db?timeout=9"),
        ("sqlite:///./m.db", "sqlite:///{home}/m.db"),
        ("sqlite:////abs/m.db", "sqlite:////abs/m.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("./mlruns", "{home}/mlruns"),
        ("file:mlruns", "{home}/mlruns"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("/abs/mlruns", "/abs/mlruns"),
        ("http://host:5000/prefix", "http://host:5000/prefix"),
        ("databricks", "databricks"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
    ],
)
def test_a_relative_store_counts_from_the_working_folder(
    given: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert mlflow_uri(None, tmp_path) == absolute.format(home=tmp_path) == mlflow_uri(given, tmp_path)


def test_a_relative_store_of_an_older_record_is_the_same_store(tmp_path: Path, store: str) -> None:
    run = start(tmp_path, "sqlite:///mlflow.db")
    path = tmp_path / "run/mlflow_run.json"
    record = json.loads(path.read_text())
    assert record["tracking_uri"] == store
    path.write_text(json.dumps(record | {"tracking_uri": "sqlite:///mlflow.db"}))
    assert start(tmp_path, "sqlite:///mlflow.db") == run


@pytest.mark.slow
def test_a_real_server_behind_a_password_and_a_path_prefix(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(store, tmp_path / "artifacts") as (url, _), behind_proxy(url, "/tools/mlflow", "ann", "p4ss") as place:
        assert "wants to know who asks" in sentence(tmp_path, f"{place}/tools/mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p4ss")
        assert "without MLflow under this path" in sentence(tmp_path, place)
        check_everything_arrives(tmp_path, f"{place}/tools/mlflow", url, "by environment")
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        address = f"{place}/tools/mlflow".replace("http://", "http://ann:p4ss@")
        check_everything_arrives(tmp_path, address, url, "by address")
        assert "p4ss" not in (tmp_path / "by address/mlflow_run.json").read_text()


def check_everything_arrives(tmp_path: Path, address: str, url: str, name: str) -> None:
    run = start(tmp_path, address, name)
    tracker = MLflowTracker(run, open_folder(tmp_path / name))
    tracker.log_metrics({"train/loss": 3.0, "train/lr": 0.1}, 1)
    tracker.log_sample(1, "a", "b")
    tracker.finish("FINISHED")
    client = MlflowClient(url)
    assert count_waiting(open_folder(tmp_path / name), run.run_id) == 0
    assert [point.value for point in client.get_metric_history(run.run_id, "train/loss")] == [3.0]
    assert {"samples.json", "report.html"} <= {file.path for file in client.list_artifacts(run.run_id)}
    assert "/tools/mlflow/#/experiments/" in run.location and "p4ss" not in run.location
