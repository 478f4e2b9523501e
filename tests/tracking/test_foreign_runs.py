"""The run folder of somebody else: its journal sends no file of this machine, and no damaged file stops a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.run_files import (
    BATCH_SIZES_FILE,
    BEST_FILE,
    JOURNAL_SENT_FILE,
    MLFLOW_RUN_FILE,
    RUN_FILE,
    SUMMARY_FILE,
)
from pipeline.storage.folders import open_folder
from pipeline.tracking import report
from pipeline.tracking.journal import Journal, count_waiting, read_journal
from pipeline.tracking.lineage import read_parent
from pipeline.tracking.mlflow_run import MLflowRun, recorded_run_id
from pipeline.tracking.mlflow_writer import MLflowWriter
from pipeline.tracking.run_history import RunHistory
from pipeline.training import largest_batch, run_folder


class Client:
    """Notes the artifacts that it is given."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self.contents.append(Path(path).read_bytes())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, and a secret beside it."""
    (tmp_path / "secret").write_text("SECRET")
    (tmp_path / "run/profile").mkdir(parents=True)
    (tmp_path / "run/report.html").write_text("a report")
    (tmp_path / "run/link.html").symlink_to(tmp_path / "secret")
    (tmp_path / "run/profile/away").symlink_to(tmp_path)
    return tmp_path / "run"


def write(run: Path, *entries: dict[str, Any]) -> None:
    lines = [json.dumps({"time": 1, **entry}) for entry in entries]
    (run / "tracking.jsonl").write_text("".join(f"{line}\n" for line in lines))


def send(run: Path) -> list[bytes]:
    """What reaches the store."""
    client, journal = Client(), Journal(open_folder(run))
    writer = MLflowWriter(MLflowRun(tracking_uri="", experiment_id="0", run_id="r"), client, open_folder(run), None)
    for entry, _ in journal.read(0):
        try:
            writer.write([entry])
        except UserError as error:
            assert "none of its folder" in str(error)
        except FileNotFoundError:  # RUN//secret is a name in the folder
            assert kind_and_path(entry) == ("file", f"{run}//secret")
    journal.close()
    return client.contents


def test_a_file_of_the_run_is_sent(run: Path) -> None:
    write(run, {"kind": "file", "path": str(run / "report.html")}, {"kind": "page", "name": "report.html"})
    assert send(run) == [b"a report"] * 2


@pytest.mark.parametrize("name", ["../secret", "link.html", "profile/away/secret", "/secret", "x/../../secret"])
@pytest.mark.parametrize("kind", ["file", "page"])
def test_no_other_file_is_sent(run: Path, name: str, kind: str) -> None:
    key, value = ("path", f"{run}/{name}") if kind == "file" else ("name", name)
    write(run, {"kind": kind, key: value}, {"kind": kind, key: str(run.parent / "secret")})
    assert send(run) == []


def kind_and_path(entry: dict[str, Any]) -> tuple[str, str | None]:
    return entry["kind"], entry.get("path")


LINES = [
    b"[]",
    b"null",
    b'"x"',
    b"[" * 100_000,
    b'{"kind": "metrics", "time": 1, "step": 1, "values": {"a": ' + b"[" * 1000,
    b'{"kind": "metrics", "time": 1, "step": "1", "values": {}}',
    b'{"kind": "metrics", "time": 1, "step": 1, "values": {"a": "b"}}',
    b'{"kind": "metrics", "time": 1, "step": 1' + b"0" * 30 + b', "values": {}}',
    b'{"kind": "metrics", "time": 1' + b"0" * 30 + b', "step": 1, "values": {}}',
    b'{"kind": "tags", "time": 1, "values": [1]}',
    b'{"kind": "status", "time": 1, "status": "HACKED"}',
    b'{"kind": "delete", "time": 1}',
    b'{"time": 1}',
    b"x" * 10_000_000,
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:60]))
def test_a_line_that_does_not_fit_is_left_out(run: Path, line: bytes) -> None:
    sound = b'{"kind": "metrics", "time": 1, "step": %d, "values": {"train/loss": 1.5}}\n'
    (run / "tracking.jsonl").write_bytes(sound % 1 + line + b"\n" + sound % 2)
    assert [entry["step"] for entry in read_journal(open_folder(run))] == [1, 2]
    journal = Journal(open_folder(run))
    assert journal.last_step["train/loss"] == 2
    journal.close()
    assert count_waiting(open_folder(run), "r") == 2


def test_what_fits_the_schema_but_no_run_makes_a_report_too(run: Path) -> None:
    write(
        run,
        {"kind": "tags", "values": {"workers": "-9" * 5000}},
        {"kind": "params", "values": {"price_per_hour": "<b>free</b>", "lr": [{}]}},
        {"kind": "metrics", "step": 2**63 - 1, "values": {"perf/step_seconds": 0.0, "perf/data_wait_seconds": 1.0}},
        {"kind": "sample", "step": 1, "prompt": "<script>", "text": "<script>alert(1)</script>"},
    )
    (run / SUMMARY_FILE).write_text('{"val_loss": 1, "steps": 7}')
    history = RunHistory.from_journal(read_journal(open_folder(run)))
    assert report.write_pages(open_folder(run), read_journal(open_folder(run))) == ["report.html"]
    assert history.periods[-1][2] == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "in 7 steps" in page


WRONG = [b"[]", b"null", b"7", b"", b"[" * 100_000, b'{"step": "x"}', b'{"run_id": []}', b"\xff", b'{"steps": 1e999}']


@pytest.mark.parametrize("content", WRONG, ids=lambda content: repr(content[:20]))
def test_every_damaged_file_of_a_run_is_one_sentence_or_is_put_aside(run: Path, content: bytes) -> None:
    folder = open_folder(run)
    for name in (BEST_FILE, MLFLOW_RUN_FILE, RUN_FILE, JOURNAL_SENT_FILE, SUMMARY_FILE, BATCH_SIZES_FILE):
        (run / name).write_bytes(content)
    write(run, {"kind": "start"})
    assert count_waiting(folder, "r") == 0
    with pytest.raises(UserError, match=r"best\.json is damaged .*; delete it"):
        run_folder.read_best(folder)
    with pytest.raises(UserError, match=r"mlflow_run\.json is damaged .*; delete it"):
        recorded_run_id(folder)
    with pytest.raises(UserError, match=r"run\.json is damaged .*; delete it"):
        read_parent(folder)
    if content != b"[]":
        with pytest.raises(UserError, match=r"batch_size\.json is damaged .*; delete it"):
            largest_batch._known_size(folder, {})
    report.write_pages(folder, [])
    assert "in 0 steps" in (run / "report.html").read_text(encoding="utf-8")
