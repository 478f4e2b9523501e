"""A local run listens on 127.0.0.1 only: Ray, its workers, and the store by which they find each other."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cluster import auth_token
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from tests.support.factories import tiny_config
from tests.support.fixtures import ROOT
from tests.support.listening import beyond_loopback, is_loopback, listening
from tests.support.ranks import run_ranks

WAIT_SECONDS = 1200


def test_addresses_are_told_apart() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "::1", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1"]))


def test_ranks_of_tests(tmp_path: Path) -> None:
    result = run_ranks("listening_process.py", tmp_path, world_size=2)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        addresses = json.loads((tmp_path / str(rank)).read_text())
        assert addresses, "gloo listens for the other rank"
        assert all(map(is_loopback, addresses)), addresses
    assert not beyond_loopback(os.getpid()), "the store"


def test_a_run_with_two_workers(tiny_data: Path, tmp_path: Path) -> None:
    """Without any setting of Ray in its environment, as a user starts it: the job finds the safe ones itself."""
    config = tiny_config(data=str(tiny_data), output="run", train_steps=100_000, num_workers=2, device="cpu")
    settings = {name: value for name, value in to_dict(config).items() if value != getattr(PretrainConfig(), name)}
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *(f"--{n}={v}" for n, v in settings.items())]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = tmp_path / "home"
    home.mkdir()
    environment = plain | {"HOME": str(home), "GPT25_HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not has_trained(tmp_path / "run" / "tracking.jsonl"):
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        commands = "\n".join(line for lines in listening(job.pid).values() for line in lines)
        assert "gcs_server" in commands and "raylet" in commands and "RayTrainWorker" in commands
        assert not beyond_loopback(job.pid)
        # 405: the page of metrics, which takes no POST. Any other answer: another user of this machine could run code.
        assert {401} <= answers_to_a_job_without_a_token(job.pid) <= {401, 405}
        token = home / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    finally:
        family = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
        job.send_signal(signal.SIGTERM)
        job.wait(1200)
        for process in family:
            if process.is_running():
                process.kill()


def answers_to_a_job_without_a_token(pid: int) -> set[int]:
    """The statuses with which the ports of a job's dashboard answer to a command that they should run."""
    lines = [line.split(maxsplit=1) for lines in listening(pid).values() for line in lines]
    body = json.dumps({"entrypoint": "true"}).encode()
    found = set()
    for port in [port for port, command in lines if "dashboard/dashboard.py" in command]:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        with contextlib.closing(connection), contextlib.suppress(http.client.HTTPException, OSError):  # gRPC, not HTTP
            connection.request("POST", "/api/jobs/", body, {"Content-Type": "application/json"})
            found.add(connection.getresponse().status)
    return found


def has_trained(journal: Path) -> bool:
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return any(entry["kind"] == "metrics" and "train/loss" in entry["values"] for entry in map(json.loads, lines))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return tmp_path


def in_memory() -> str | None:
    """The token in the environment, which the next test must not see."""
    return os.environ.pop("RAY_AUTH_TOKEN", None)


def test_a_token_is_made_for_its_owner_alone_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        auth_token.ensure_private_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(token := path.read_text()) == 64 and in_memory() is None
    auth_token.ensure_private_token()
    assert path.read_text() == token


def test_a_token_that_others_can_read_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("known to all")
    path.chmod(0o644)
    auth_token.ensure_private_token()
    assert len(in_memory() or "") == 64
    assert "other users can read" in caplog.text
    assert path.read_text() == "known to all", "a cluster may run with it"


@pytest.mark.parametrize("obstacle", ["a file", "an empty token"])
def test_without_a_usable_file_the_token_stays_in_memory(home: Path, obstacle: str) -> None:
    folder = home / ".ray"
    if obstacle == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "auth_token").touch(0o600)
    auth_token.ensure_private_token()
    assert len(in_memory() or "") == 64


def test_a_token_of_the_environment_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    auth_token.ensure_private_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine" and not (home / ".ray").exists()


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_cluster_files_replaces_a_token_that_others_could_read(tmp_path: Path, mode: int) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("an old one")
    token.chmod(mode)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    venv = Path(sys.executable).parents[1]
    command = ["make", "cluster-files", f"VENV={venv}", f"HOME={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=variables | {"HOME": str(tmp_path)}, check=True, stdout=subprocess.DEVNULL)
    assert (token.read_text() == "an old one") == (mode == 0o600)
    for path in (token, tmp_path / ".gpt-2.5.env"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
