"""The whole job under signals, with a worker that stands still, on a node that leaves: stopped, or started again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.checkpoints.reader import list_checkpoints
from pipeline.config.training import PretrainConfig
from tests.jobs.test_job_submit import cluster  # noqa: F401  # a fixture
from tests.support.ray_environment import own_environment
from tests.support.training_job import TrainingJob, running_cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400
FLAGS: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 32,
    "d_ff": 64,
    "context_length": 32,
    "tokens_per_step": 32 * 16,
    "batch_size": 2,
    "train_steps": STEPS,
    "lr": 5e-3,
    "val_every": STEPS,
    "val_tokens": 200,
    "sample_every": STEPS,
    "sample_tokens": 8,
    "checkpoint_every": 20,
    "num_workers": 2,
    "device": "cpu",
}

pytestmark = pytest.mark.slow

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path) -> Start:
    """Starts jobs/pretrain.py with a local Ray of its own."""

    def begin(**more: object) -> subprocess.Popen[str]:
        environment = own_environment() | {"GPT25_HOME": str(tmp_path)}
        settings = {"data": tiny_data, "output": "run", **FLAGS, **more}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *flags]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


def newest(tmp_path: Path) -> int:
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    return found[-1][0] if found else 0


def wait_for_step(tmp_path: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 1200
    while newest(tmp_path) < step:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)


def test_sigterm_and_ctrl_c_stop_behind_a_checkpoint_and_the_same_command_goes_on(start: Start, tmp_path: Path) -> None:
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        job = start()
        wait_for_step(tmp_path, before + 20, job)
        job.send_signal(number)
        output, _ = job.communicate(timeout=1200)
        assert job.returncode == 128 + number, output
        stopped = newest(tmp_path)
        assert f"stopped at step {stopped} of {STEPS}; the same command goes on from there" in output
        assert "Traceback" not in output and "PlacementGroupCleaner" not in output
        assert before < stopped < STEPS
        if before:
            assert f"resuming at step {before}" in output
        before = stopped
    assert not list((tmp_path / "run").glob("stop-*")) and not list((tmp_path / "run").glob("error-*"))


def test_a_worker_that_stands_still_costs_a_restart(start: Start, tmp_path: Path) -> None:
    job = start(collective_timeout=30, max_failures=1)
    wait_for_step(tmp_path, 40, job)
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGSTOP)
    output, _ = job.communicate(timeout=1200)
    assert job.returncode == 0, output
    assert "stands still: nothing has happened for" in output
    assert "has been silent for" in output or "does not answer" in output
    assert "resuming at step" in output
    assert newest(tmp_path) == STEPS
    assert not workers[1].is_running() or workers[1].status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(2400)
def test_a_node_that_is_about_to_leave_costs_nothing_but_a_restart(tiny_data: Path, tmp_path: Path) -> None:
    never = 10**6
    shape: dict[str, Any] = {**FLAGS, "train_steps": never, "checkpoint_every": never, "val_every": never}
    changes: dict[str, Any] = {"data": str(tiny_data), "output": "run", "max_failures": 0, "tokens_per_step": 32 * 64}
    config = PretrainConfig(**{**shape, **changes, "sample_every": never, "tracking_uri": f"sqlite:///{tmp_path}/m.db"})
    with running_cluster(2, 2) as nodes:
        job = TrainingJob(nodes, config, tmp_path)
        try:
            job.wait_for(lambda: job.step() >= 10, "ten steps")
            workers = {worker.ppid() for worker in job.workers()}
            (node,) = (n for n in nodes.worker_nodes if n.all_processes["raylet"][0].process.pid in workers)
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
            drain = ["drain-node", "--address", nodes.address, "--node-id", node.node_id, *reason]
            ray_command = str(Path(sys.executable).with_name("ray"))
            subprocess.run([ray_command, *drain, "--deadline-remaining-seconds", "30"], check=True)
            job.wait_for(lambda: newest(tmp_path), "a checkpoint that was not due")
            saved = newest(tmp_path)
            job.wait_for(lambda: f"resuming at step {saved}" in job.log(), "another group")
            job.wait_for(lambda: len(job.steps()) and job.step() > saved + 5, "five more steps")
            assert all(worker.ppid() not in workers for worker in job.workers()), "it went to the other node"
            job.driver.send_signal(signal.SIGTERM)
            assert job.driver.wait(1200) == 128 + signal.SIGTERM, job.log()[-3000:]
            assert f"stopped at step {newest(tmp_path)} of" in job.log()
        finally:
            job.stop()


@pytest.mark.timeout(2400)
def test_ray_job_stop_leaves_a_checkpoint_where_it_is_given_the_time(
    cluster: dict[str, str],  # noqa: F811  # the fixture
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    def ray_job(*arguments: str) -> str:
        command = ["ray", "job", *arguments]
        found = subprocess.run(
            command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=1200, check=False
        )
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
        return found.stdout

    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "100"}})
    options = ["--no-wait", "--submission-id", "stopped", "--working-dir", ".", "--runtime-env-json", patience]
    never = {"train_steps": 10**6, "checkpoint_every": 10**6}
    flags = [f"--{name}={value}" for name, value in {**FLAGS, **never, "data": tiny_data, "output": "run"}.items()]
    ray_job("submit", *options, "--", "python", "jobs/pretrain.py", *flags)
    deadline = time.monotonic() + 1200
    while "step  " not in (log := ray_job("logs", "stopped")) or " loss " not in log:
        assert time.monotonic() < deadline, log
        time.sleep(2)
    ray_job("stop", "stopped")
    log = ray_job("logs", "stopped")
    assert newest(tmp_path) > 0, log
    assert f"stopped at step {newest(tmp_path)} of" in log


def test_a_shard_that_is_cut_short_under_the_run_costs_one_restart_and_is_named(
    start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    job = start(data=data, train_steps=10**6)
    wait_for_step(tmp_path, 20, job)
    with (data / "train_000000.bin").open("r+b") as file:
        file.truncate(2000)
    output, _ = job.communicate(timeout=1200)
    assert job.returncode == 1, output
    assert f"error: shard {data / 'train_000000.bin'} is damaged: its header counts" in output
    assert newest(tmp_path) >= 20
