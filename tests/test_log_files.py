"""Log files of a run: every line once and bounded, on a disk and in a bucket, and never a reason for a run to end."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import log_files
from pipeline.errors import RunStopped, UserError
from pipeline.log_files import keep_log
from pipeline.storage.folders import open_folder
from tests.support.s3_server import S3

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (?P<level>[A-Z]+) (?P<message>.*)")


@pytest.fixture
def source() -> Iterator[logging.Logger]:
    logger = logging.getLogger(f"pipeline.{uuid.uuid4().hex}")
    logger.setLevel(logging.INFO)
    yield logger


def lines(text: str) -> list[tuple[str, str]]:
    """Level and message of every line."""
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(matches), text
    return [(match["level"], match["message"]) for match in matches if match]


def test_a_line_has_time_and_level_and_neither_colours_nor_secrets(tmp_path: Path, source: logging.Logger) -> None:
    with keep_log(open_folder(tmp_path / "logs"), "driver"):
        source.info("\x1b[36mstep %d\x1b[0m of żółw", 3)
        source.warning("https://me:SECRET@host/x does not answer \x07")
    began, *rest, ended = lines((tmp_path / "logs" / "driver.log").read_text())
    assert began[1].startswith("began: process ") and ended == ("INFO", "ended")
    assert rest == [("INFO", "step 3 of żółw"), ("WARNING", "https://host/x does not answer \\x07")]


@pytest.mark.parametrize(
    ("error", "level"), [(UserError("no --data at https://a:b@c/; give it"), "ERROR"), (RunStopped("stopped"), "INFO")]
)
def test_the_file_says_how_it_ended(tmp_path: Path, error: Exception, level: str) -> None:
    with pytest.raises(type(error)), keep_log(open_folder(tmp_path), "driver"):
        raise error
    text = (tmp_path / "driver.log").read_text()
    assert lines(text)[-1] == (level, str(error).replace("a:b@", "")) and "Traceback" not in text


def test_a_crash_leaves_its_traceback_without_secrets(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), keep_log(open_folder(tmp_path), "rank-000"):
        raise ZeroDivisionError("at s3://me:SECRET@host/x")
    text = (tmp_path / "rank-000.log").read_text()
    assert "ERROR ended by ZeroDivisionError" in text and "Traceback" in text
    assert "SECRET" not in text and text.rstrip().endswith("ZeroDivisionError: at s3://host/x")


def test_a_process_that_starts_again_writes_on(tmp_path: Path, source: logging.Logger) -> None:
    for number in range(3):
        with keep_log(open_folder(tmp_path), "rank-001"):
            source.info("start %d", number)
    messages = [message for _, message in lines((tmp_path / "rank-001.log").read_text())]
    assert [message for message in messages if message.startswith("start")] == ["start 0", "start 1", "start 2"]
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler, log_files.LogFile)]


def test_the_files_are_bounded_and_have_the_newest_lines(
    tmp_path: Path, source: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_BYTES", 2000)
    with keep_log(open_folder(tmp_path), "rank-000"):
        for number in range(500):
            source.info("line %d", number)
    files = [tmp_path / f"rank-000.log{end}" for end in (".2", ".1", "")]
    assert sorted(tmp_path.iterdir()) == sorted(files) and all(file.stat().st_size < 2100 for file in files)
    kept = [message for file in files for _, message in lines(file.read_text())]
    assert kept == [*(f"line {number}" for number in range(501 - len(kept), 500)), "ended"]


def test_a_bucket_has_all_lines_over_restarts_and_rotations(
    s3: S3, source: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_BYTES", 2000)
    folder = open_folder(f"{s3.url}/runs/one/logs")
    for start in range(8):
        with keep_log(folder, "rank-000"):
            for number in range(6):
                source.info("line %d", 6 * start + number)
    names = folder.names()
    assert names == ["rank-000.log", "rank-000.log.1"]
    text = "".join(folder.read(name).decode() for name in reversed(names))
    assert [m for _, m in lines(text) if m.startswith("line")] == [f"line {number}" for number in range(48)]


def test_a_place_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, source: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with keep_log(open_folder(tmp_path / "file" / "logs"), "driver"):
        source.info("goes on")
    (tmp_path / "driver.log").symlink_to("/dev/full")
    with keep_log(open_folder(tmp_path), "driver"):
        for _ in range(3):
            source.info("goes on")
    warnings = [record.getMessage() for record in caplog.records if record.name == "pipeline.log_files"]
    assert len(warnings) == 2
    assert warnings[0].startswith("no log is kept in") and "No space left on device" in warnings[1]


OUTPUT = """
import logging, os, sys
from pathlib import Path
from pipeline.log_files import keep_log
from pipeline.storage.folders import open_folder
print(":actor_name:RayTrainWorker", flush=True)
with keep_log(open_folder(sys.argv[1]), "rank-000", with_output=True):
    logging.getLogger("pipeline").warning("by the logger")
    print("by print", flush=True)
    os.write(2, b"\\x1b[33mNCCL WARN by the library\\x1b[0m\\n")
    logging.getLogger("pipeline").info("below the level")
    logging.getLogger("pipeline").warning("by the logger")
"""


def test_a_workers_output_past_the_logger_is_in_its_file_once(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        command = [sys.executable, "-c", OUTPUT, str(tmp_path / "logs")]
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, check=True)
    found = lines((tmp_path / "logs" / "rank-000.log").read_text())
    assert sorted(found[1:]) == sorted(
        [
            ("WARNING", "by the logger"),
            ("WARNING", "by the logger"),
            ("STDOUT", "by print"),
            ("STDERR", "NCCL WARN by the library"),
            ("INFO", "ended"),
        ]
    )
    assert (tmp_path / "err").read_text().count("by the logger") == 2  # the terminal keeps its lines
