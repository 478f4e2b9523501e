"""A neighbour in the network scans this machine while jobs run: no port of theirs takes its connections.

The neighbour is a network namespace; it tries all 65,535 TCP ports of this machine's address on the link between them.
Others may run servers here, so what counts is which process a port that answers belongs to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from tests.cluster.test_local_ports import has_trained
from tests.support.factories import tiny_config
from tests.support.fixtures import ROOT
from tests.support.listening import listening
from tests.support.models import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WAIT_SECONDS = 1200
HERE = "10.79.0.1"


@pytest.fixture(scope="module")
def neighbour() -> Iterator[str]:
    """The name of a namespace that reaches this machine at HERE."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    name = f"scan{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{HERE}/24", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "addr", "add", "10.79.0.2/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield name
    finally:
        for command in (["link", "delete", name], ["netns", "delete", name]):
            subprocess.run(["ip", *command], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def scanned(neighbour: str, *options: str) -> dict[int, str]:
    """Port -> answer of this machine, as the neighbour sees it; all ports, unless ``--ports=...`` names some."""
    command = ["ip", "netns", "exec", neighbour, sys.executable, str(ROOT / "tests/support/scan.py"), HERE, *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    return {int(port): answer for port, answer in json.loads(result.stdout)[HERE].items()}


def ports_of(pid: int) -> dict[int, str]:
    """Port -> command of what a job listens on."""
    lines = [line for lines in listening(pid).values() for line in lines]
    return {int(port): command for port, command in (line.split(" ", 1) for line in lines)}


@contextlib.contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job as a user starts it, without any setting of Ray; its output is in ``folder/log``."""
    home = folder / "home"
    home.mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = plain | {"HOME": str(home), "GPT25_HOME": str(folder)}
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield job
    finally:
        family = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
        job.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(1200)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def await_job(job: subprocess.Popen[bytes], is_ready: object, folder: Path) -> None:
    assert callable(is_ready)
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_ready():
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
        time.sleep(0.5)


def test_the_scan_finds_what_listens_for_others_and_not_what_listens_on_loopback(neighbour: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everyone, socket.create_server(("127.0.0.1", 0)) as here:
        open_port, own_port = everyone.getsockname()[1], here.getsockname()[1]
        assert set(scanned(neighbour, f"--ports={open_port},{own_port}")) == {open_port}


def assert_closed(neighbour: str, job: subprocess.Popen[bytes], words: tuple[str, ...]) -> None:
    before = ports_of(job.pid)
    answers = scanned(neighbour)
    ports = before | ports_of(job.pid)
    assert all(any(word in command for command in ports.values()) for word in words), ports
    assert {port: (answers[port], ports[port]) for port in set(answers) & set(ports)} == {}
    sys.stdout.write(f"[scan] {len(ports)} ports of the job, {sorted(answers)} of others answered\n")


def test_a_local_training(neighbour: str, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(data=str(tiny_data), output="run", train_steps=1_000_000, num_workers=2, device="cpu")
    settings = {name: value for name, value in to_dict(config).items() if value != getattr(PretrainConfig(), name)}
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *(f"--{n}={v}" for n, v in settings.items())]
    with running(command, tmp_path) as job:
        await_job(job, lambda: has_trained(tmp_path / "run/tracking.jsonl"), tmp_path)
        assert_closed(neighbour, job, ("gcs_server", "raylet", "RayTrainWorker"))


def test_a_server(neighbour: str, tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = train(tiny_data, tmp_path / "trained")
    command = [sys.executable, str(ROOT / "jobs/serve.py"), str(checkpoint), "--port=0", "--device=cpu"]
    with running(command, tmp_path) as job:
        await_job(job, lambda: "serve: ready" in (tmp_path / "log").read_text(), tmp_path)
        assert_closed(neighbour, job, ("gcs_server", "raylet", "serve.py"))


def test_the_demo(neighbour: str, tmp_path: Path) -> None:
    """While Ray Data works on the text, and while it trains."""
    command = [sys.executable, str(ROOT / "jobs/demo.py"), "--config", str(ROOT / "configs/demo.yaml")]
    with running(command, tmp_path) as job:
        await_job(job, lambda: "raylet" in str(ports_of(job.pid)), tmp_path)
        assert_closed(neighbour, job, ("gcs_server", "raylet"))
        await_job(job, lambda: has_trained(tmp_path / "runs/demo/tracking.jsonl"), tmp_path)
        assert_closed(neighbour, job, ("gcs_server", "raylet"))
