"""The README's cluster commands: ``ray start --head``, then both ``ray job submit``, with four workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.support.ray_environment import own_environment

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"

pytestmark = pytest.mark.slow

PRESET = """
tokenize: {source: installed-docs, output: data/small, vocab_size: 1024, sample_bytes: 8000000, val_fraction: 0.01}
pretrain:
  {data: data/small, output: runs/small, num_layers: 2, num_heads: 2, d_model: 64, d_ff: 128, context_length: 64,
   tokens_per_step: 2048, batch_size: 8, train_steps: 30, lr: 3.0e-3, num_workers: 4, device: cpu, val_every: 15,
   val_tokens: 4096, sample_every: 15, checkpoint_every: 10}
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node of four logical CPUs with a home of its own; yields the submitter's environment."""
    environment = own_environment() | {"GPT25_HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with head_node(environment) as address:
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}


@contextlib.contextmanager
def head_node(environment: dict[str, str]) -> Iterator[str]:
    """A head node that `ray start` has started in ``environment``; yields the address of its dashboard."""
    gcs, dashboard = free_ports(2)
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the paths of sockets have a limit of 107 bytes
    command = ["ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    head = subprocess.Popen(
        [*command, "--dashboard-host=127.0.0.1", f"--temp-dir={session}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_listening(dashboard, head)
        yield address
    finally:
        stop(head)
        shutil.rmtree(session, ignore_errors=True)


def stop(head: subprocess.Popen[bytes]) -> None:
    """End this node's processes; ``ray stop`` would end those of every cluster on the machine."""
    if head.poll() is not None:
        return
    processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()


def wait_until_listening(port: int, head: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert head.poll() is None, "ray start ended by itself"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the dashboard did not start")


def submit(job: str, preset: str, environment: dict[str, str], *flags: str) -> str:
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", "--config", preset]
    command += flags
    for _ in range(120):  # the dashboard answers some time before the agent that starts jobs does
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
        )
        if "No available agent to submit job" not in result.stdout + result.stderr:
            break
        time.sleep(1)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


def test_both_jobs_on_a_cluster(cluster: dict[str, str], tmp_path: Path) -> None:
    preset = tmp_path / "small.yaml"
    preset.write_text(PRESET)
    assert "tokenize: done" in submit("tokenize", str(preset), cluster)
    log = submit("pretrain", str(preset), cluster)
    assert "4 workers on cpu" in log and "pretrain: done" in log
    summary = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert summary["steps"] == 30 and summary["last_loss"] < summary["first_loss"] - 0.5
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "gpt-2.5"]
    runs = {run.data.tags["job"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {job: run.info.status for job, run in runs.items()} == {"tokenize": "FINISHED", "pretrain": "FINISHED"}
    assert runs["pretrain"].data.metrics["train/loss"] == pytest.approx(summary["last_loss"])
    assert "done before" in submit("tokenize", str(preset), cluster)


def test_the_readmes_commands_work_with_the_token_that_a_local_job_left(tmp_path: Path) -> None:
    """Ray's head asks for the token as soon as there is one; whoever submits a job has to be told to show it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    code = "from pipeline.cluster.ray_cluster import set_local_environment; set_local_environment()"
    subprocess.run(["python", "-c", code], cwd=ROOT, env=variables, check=True)
    token = (tmp_path / ".ray" / "auth_token").read_text()
    block = (ROOT / "README.md").read_text().partition("## On a cluster\n")[2].partition("\n## ")[0]
    exports = dict(re.findall(r"^    export (\w+)=(\S+)", block, re.MULTILINE))
    assert "ray job submit --working-dir . -- python jobs/pretrain.py" in block and "`ray start --head`" in block
    with head_node(variables | exports) as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=600)
        request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        assert urllib.request.urlopen(request, timeout=600).status == 200
        environment = variables | exports | {"RAY_API_SERVER_ADDRESS": address}
        assert "train_steps: 80000" in submit("pretrain", "configs/gpt2.5.yaml", environment, "--dry_run")
