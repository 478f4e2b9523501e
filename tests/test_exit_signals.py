"""Commands under signals, without Ray: one closing line, the exit code, and an end in any case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fixtures import ROOT

HEAD = f"""
import sys, time
sys.path[0] = {str(ROOT)!r}
from jobs._run import guarded
from pipeline.errors import RunStopped, UserError
def ready():
    print("ready", flush=True)
"""
TAIL = '\nguarded(job, resume="goes on")\n'
CLOSING = "interrupted; the same command goes on"
JOBS = {
    "waits": "def job():\n    ready()\n    time.sleep(600)",
    "swallows it": """
def job():
    ready()
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass""",
    "makes another error of it": """
def job():
    try:
        ready()
        time.sleep(600)
    except BaseException as error:
        raise RuntimeError("of a library") from None""",
    "makes a mistake of it": """
def job():
    try:
        ready()
        time.sleep(600)
    except BaseException as error:
        raise UserError("the store does not answer") from None""",
    "is in other code": """
import hashlib
def job():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)""",
    "is told by a library, which alone has heard of it": """
import signal
from pipeline import exit_signals
def leave(number, frame):
    sys.exit(number)
def job():
    for number in exit_signals.NUMBERS:
        signal.signal(number, leave)
    signal.set_wakeup_fd(-1)
    try:
        ready()
        time.sleep(600)
    except SystemExit as stop:
        exit_signals.interrupt(stop.code)""",
    "cleans up": """
def job():
    try:
        ready()
        time.sleep(600)
    finally:
        print("clean", flush=True)""",
}


def start(code: str, tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + code + TAIL)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_ends_whatever_it_does(tmp_path: Path, name: str, number: signal.Signals) -> None:
    process = start(JOBS[name], tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert errors.splitlines() == [CLOSING]
    assert output == ("clean\n" if name == "cleans up" else "")


def test_the_same_signal_twice_as_timeout_sends_it(tmp_path: Path) -> None:
    """The process gets it, and then its group: the clean-up is not cut short by the second one."""
    code = """
import os, signal
def job():
    try:
        ready()
        time.sleep(600)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("clean", flush=True)"""
    process = start(code, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output, errors) == (143, "clean\n", f"{CLOSING}\n")


def test_timeout_itself(tmp_path: Path) -> None:
    """It passes on the signal that it gets as it sends its own."""
    (tmp_path / "script.py").write_text(HEAD + JOBS["waits"] + TAIL)
    command = ["timeout", "--preserve-status", "600", sys.executable, str(tmp_path / "script.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (143, f"{CLOSING}\n")


STOPPING = """
import os, signal
from pipeline.distributed.signals import GivenUp, call_in_thread, stop_on_signals
def job():
    with stop_on_signals() as request:
        ready()
        {work}
    error = RunStopped("stopped at step 5; the same command goes on from there")
    error.signal_number = request.signal_number
    raise error
"""


def test_a_run_that_saves_is_given_its_time_and_the_same_signal_twice_is_one(tmp_path: Path) -> None:
    work = "while not request(): time.sleep(0.05)\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(4)"
    process = start(STOPPING.format(work=work), tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "stopped at step 5; the same command goes on from there"
    assert len(errors.splitlines()) == 2 and errors.startswith("SIGTERM: ")


def test_a_second_signal_later_on_ends_it_at_once_with_a_line(tmp_path: Path) -> None:
    work = (
        "while not request(): time.sleep(0.05)\n        time.sleep(1.2)\n        print('again', flush=True)\n"
        "        time.sleep(600)"
    )
    process = start(STOPPING.format(work=work), tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "ended at once; the same command goes on from the newest checkpoint"


def test_a_signal_in_the_middle_of_a_print_does_not_cost_the_closing_line(tmp_path: Path) -> None:
    """Python refuses to flush a stream in a handler that came while the same stream was being written."""
    code = """
import sys
class InUse:
    def fileno(self): return 1
    def flush(self): raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
def job():
    from pipeline import exit_signals
    sys.stdout = InUse()
    exit_signals.end(2, "the last words")
"""
    _, errors = (process := start(code, tmp_path)).communicate(timeout=100)
    assert (process.returncode, errors) == (130, "the last words\n")


def test_work_of_which_nothing_can_be_saved_is_not_waited_for(tmp_path: Path) -> None:
    work = """try:
            call_in_thread(lambda: time.sleep(600), give_up=request)
        except GivenUp:
            error = RunStopped("stopped before the workers had begun")
            error.signal_number, error.at_once = request.signal_number, True
            raise error from None"""
    process = start(STOPPING.format(work=work), tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and errors.splitlines()[-1] == "stopped before the workers had begun"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_imports_of_a_job(tmp_path: Path, number: signal.Signals) -> None:
    """A module that Python imports first (sitecustomize) sends the signal as the job asks for its first own module."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def hook(event, arguments):\n"
        f"    if event == 'import' and arguments[0] == 'yaml': os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(hook)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--dry_run"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout) == (128 + number, "")
    assert result.stderr == "interrupted before anything began\n"


@pytest.mark.parametrize("flags", [["--help"], ["--dry_run"]])
def test_a_reader_that_leaves_gets_no_traceback(tmp_path: Path, flags: list[str]) -> None:
    """What `| head` does; the pipe is closed before anything is written to it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), *flags]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_an_output_without_room_is_one_sentence(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--dry_run"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    assert result.returncode == 1
    sentence = "error: standard output cannot be written: No space left on device; send it to a place with room\n"
    assert result.stderr == sentence
