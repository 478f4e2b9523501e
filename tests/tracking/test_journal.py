"""The journal: whole lines whatever is cut off, the same on another node, held in memory while the disk is full."""

from __future__ import annotations

import errno
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.folders import LocalFolder, open_folder
from pipeline.tracking.journal import Journal, count_waiting
from pipeline.tracking.run_history import RunHistory
from tests.support.s3_server import S3


def entries(journal: Journal) -> list[dict[str, Any]]:
    return [entry for entry, _ in journal.read(0)]


@given(data=st.data())
def test_what_is_cut_off_anywhere_leaves_whole_entries_and_goes_on(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = open_folder(Path(temporary))
        journal = Journal(folder)
        texts = data.draw(st.lists(st.text(), min_size=1, max_size=8))
        for step, text in enumerate(texts):
            journal.append("sample", step=step, prompt="", text=text)
        journal.close()
        content = journal.path.read_bytes()
        kept = data.draw(st.integers(0, len(content)))
        journal.path.write_bytes(content[:kept])
        again = Journal(folder)
        whole = content[:kept].count(b"\n")
        assert [entry["text"] for entry in entries(again)] == texts[:whole]
        assert again.samples == list(range(whole))
        again.append("sample", step=99, prompt="", text="next")
        assert [entry["step"] for entry in entries(again)] == [*range(whole), 99]
        again.close()


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_folder(tmp_path)
    journal = Journal(folder)
    for step in range(3):
        journal.append("metrics", step=step, values={"a": 1.0})
    journal.close()
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"\x00\xff\n" + lines[2])
    assert [entry["step"] for entry in entries(Journal(folder))] == [0, 2]
    assert "is damaged and left out" in caplog.text


class FullDisk:
    """A file that takes some bytes of a line, then none."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)
        self.is_full = True

    def write(self, block: bytes) -> int:
        if not self.is_full:
            return self.file.write(block)
        self.file.write(block[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_one_warning_and_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(open_folder(tmp_path))
    journal.append("metrics", step=0, values={"a": 0.0})
    journal._file.close()
    disk = FullDisk(journal.path)
    journal._file = disk  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            journal.append("metrics", step=step, values={"a": 0.0})
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text
    assert [entry["step"] for entry in entries(journal)] == [0]
    disk.is_full = False
    journal.append("metrics", step=4, values={"a": 0.0})
    assert [entry["step"] for entry in entries(journal)] == [0, 1, 2, 3, 4]


def test_a_run_in_a_bucket_goes_on_on_another_node(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(f"{s3.url}/runs/one")
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "first"))
    first = Journal(folder)
    first.append("metrics", step=1, values={"a": 1.0})
    first.mark_sent("run", first.size)
    first.append("metrics", step=2, values={"a": 1.0, "b": 1.0})
    first.mirror()
    first.append("metrics", step=3, values={"a": 1.0})  # goes down with the node
    assert count_waiting(folder, "run") == 2 and count_waiting(folder, "other") == 3
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "second"))
    second = Journal(folder)
    assert [entry["step"] for entry in entries(second)] == [1, 2]
    assert second.sent("run") > 0 and second.last_step["a"] == 2
    second.append("metrics", step=3, values={"a": 2.0})
    second.close()
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "first"))
    assert [entry["values"]["a"] for entry in entries(Journal(folder))] == [1.0, 1.0, 2.0], "the bucket's is the newer"


def test_time_and_workers_are_counted_process_by_process(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "start", "time": 0},
        {"kind": "tags", "time": 0, "values": {"workers": "4"}},
        {"kind": "metrics", "time": 3_600_000, "step": 1, "values": {"train/loss": 2.0}},
        {"kind": "start", "time": 36_000_000},
        {"kind": "tags", "time": 36_000_000, "values": {"workers": "2"}},
        {"kind": "metrics", "time": 39_600_000, "step": 1, "values": {"train/loss": 2.0}},
        {"kind": "status", "time": 43_200_000, "status": "FINISHED"},
    ]
    (tmp_path / "tracking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = RunHistory.from_journal(entries(Journal(LocalFolder(url=str(tmp_path)))))
    assert (history.hours, history.worker_hours) == (3.0, 1 * 4 + 2 * 2)
    assert len(history.periods) == 2 and history.metrics == {"train/loss": {1: 2.0}}
