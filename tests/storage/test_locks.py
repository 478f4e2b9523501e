"""One job an output folder, against a second process that holds it, ends or is killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.preprocessing import tokenize_job, train_tokenizer_job
from pipeline.storage import locks
from pipeline.storage.folders import open_folder
from pipeline.storage.locks import exclusive_output
from pipeline.training import launch

HOLD = """
import sys
from pipeline.storage.locks import exclusive_output
from pipeline.storage.folders import open_folder

with exclusive_output(open_folder(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("let go", flush=True)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.4)
    return tmp_path / "cache"


@contextlib.contextmanager
def another_job(output: Path | str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("output", ["/data/out", "s3://bucket/out"])
def test_a_second_job_is_refused(output: str) -> None:
    folder = open_folder(output)
    with another_job(output) as process:
        with pytest.raises(UserError, match=rf"another job \(process {process.pid}\) is writing to {output};"):
            exclusive_output(folder).__enter__()
        with exclusive_output(open_folder(output + "-2")):
            pass


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with another_job(tmp_path / "out"), pytest.raises(UserError, match="another job"):
        exclusive_output(open_folder(str(tmp_path / "link"))).__enter__()


def test_a_job_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "out"))
    with another_job(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive_output(folder):
            pass


def test_a_job_that_ends_is_waited_for(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 30.0)
    folder = open_folder(str(tmp_path / "out"))
    with another_job(tmp_path / "out") as process:
        assert process.stdin is not None
        timer = threading.Timer(0.5, process.stdin.close)
        timer.start()
        start = time.monotonic()
        with exclusive_output(folder):
            assert time.monotonic() - start >= 0.5
        timer.join()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_the_next_job_of_this_process(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "out"))
    with pytest.raises(ZeroDivisionError), exclusive_output(folder):
        _ = 1 / 0
    with exclusive_output(folder), pytest.raises(UserError, match="another job"):
        exclusive_output(folder).__enter__()
    with exclusive_output(folder):
        pass


def test_no_lock_can_be_made(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("no folder")
    with exclusive_output(open_folder(str(tmp_path / "out"))):
        assert "no lock can be made" in caplog.text


def test_the_data_of_another_job_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    output = tmp_path / "out"
    output.mkdir()
    (output / ".tmp-shard").write_bytes(b"half")
    config = TokenizeConfig(source=str(tmp_path / "a.txt"), output=str(output), tracking_uri="none", vocab_size=300)
    with another_job(output), pytest.raises(UserError, match="another job"):
        tokenize_job.tokenize(config)
    assert [path.name for path in output.iterdir()] == [".tmp-shard"]


def test_training_leaves_the_run_of_another_job_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = PretrainConfig(data=str(tmp_path), output=str(output), tracking_uri="none")
    learning = TrainTokenizerConfig(source=str(tmp_path), output=str(output), tracking_uri="none")
    with another_job(output):
        with pytest.raises(UserError, match="another job"):
            launch.pretrain(run)
        with pytest.raises(UserError, match="another job"):
            train_tokenizer_job.train_tokenizer(learning)
    assert not output.exists()
