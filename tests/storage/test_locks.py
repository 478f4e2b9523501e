"""One job an output folder, against a second process that holds it, ends or is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
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
def another_job(output: Path | str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command, variables = [sys.executable, "-c", HOLD, str(output)], {**os.environ, **environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("place", ["FOLDER/data/out", "s3://bucket/out"])
def test_a_second_job_is_refused(place: str, tmp_path: Path) -> None:
    output = place.replace("FOLDER", str(tmp_path))
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
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 600.0)
    folder = open_folder(str(tmp_path / "out"))
    events: list[str] = []
    with another_job(tmp_path / "out") as process:
        stdin = process.stdin
        assert stdin is not None

        def end_it() -> None:
            events.append("the other job is told to end")
            stdin.close()

        timer = threading.Timer(0.5, end_it)
        timer.start()
        with exclusive_output(folder):
            events.append("this one begins")
        timer.join()
    assert events == ["the other job is told to end", "this one begins"]
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
    with exclusive_output(open_folder(str(cache / "out"))):  # neither beside it nor in the cache
        assert "no lock can be made" in caplog.text


def test_jobs_with_other_caches_and_homes_see_each_other(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = {"GPT25_CACHE": str(tmp_path / "other/cache"), "HOME": str(tmp_path / "other")}
    with another_job(tmp_path / "out", **other) as process:
        with pytest.raises(UserError, match=rf"another job \(process {process.pid}\)"):
            exclusive_output(open_folder(tmp_path / "out")).__enter__()
        assert not (tmp_path / "out").exists()
    with exclusive_output(open_folder(tmp_path / "out")):
        assert (tmp_path / ".out.lock").is_file()
    assert not (tmp_path / ".out.lock").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    with exclusive_output(open_folder(tmp_path / "out")):  # with the lock in the cache
        pass
    assert (tmp_path / "precious").read_text() == "content" and (tmp_path / ".out.lock").is_symlink()


def test_a_second_name_of_a_file_in_place_of_the_lock_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    os.link(tmp_path / "precious", tmp_path / ".out.lock")
    with exclusive_output(open_folder(tmp_path / "out")):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def test_a_pipe_in_place_of_the_lock_stops_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".out.lock")
    with exclusive_output(open_folder(tmp_path / "out")):
        pass


def test_where_nothing_can_be_written_beside_the_cache_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_open_beside", refuse)
    with exclusive_output(open_folder(tmp_path / "out")):
        assert not (tmp_path / ".out.lock").exists()
        assert [path.suffix for path in (tmp_path / "cache/outputs").iterdir()] == [".lock"]


def refuse(path: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


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
