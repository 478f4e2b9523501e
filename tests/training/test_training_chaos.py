"""Training on four workers of two nodes, while workers, nodes, drivers and MLflow are killed: the bits of a clean run.

CHAOS_KILLS kills (33, three of them of MLflow's server), CHAOS_SEED says which and when, CHAOS_KINDS what is killed,
CHAOS_STEPS how long a run is (600), CHAOS_REPORT is a file for one JSON line per kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from pipeline.config.training import PretrainConfig
from tests.support import mlflow_server
from tests.support.factories import tiny_config
from tests.support.training_job import NODE, TrainingJob, running_cluster

KILLS = int(os.environ.get("CHAOS_KILLS", "33"))
SEED = int(os.environ.get("CHAOS_SEED", "2026"))
STEPS = int(os.environ.get("CHAOS_STEPS", "600"))
MARGIN = STEPS // 6  # more than are done while a moment is waited for
CPUS_PER_NODE = 2
HANG_SECONDS = 1200
"""--collective_timeout of the runs."""

KINDS = os.environ.get(
    "CHAOS_KINDS", "worker,driver,worker,node,worker,hang,worker,all workers,worker,driver,MLflow server"
).split(",")
MOMENTS = ("running", "running", "saving", "starting")

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow


@dataclass(kw_only=True)
class Event:
    """One kill."""

    number: int
    run: str
    kind: str
    moment: str
    """running; saving: a checkpoint was being written; starting: before the first step after the kill before."""
    step: int
    """Steps done so far."""
    time: float
    """time.time()"""
    seconds_lost: float | None = None
    """From the kill to the first step that had not been done before."""
    alone: bool = True
    """No other kill came in between."""


@pytest.fixture(scope="module")
def config(tiny_data: Path) -> PretrainConfig:
    return tiny_config(
        data=str(tiny_data),
        output="clean",
        tokens_per_step=32 * 64,
        batch_size=4,
        train_steps=STEPS,
        lr=5e-3,
        val_every=STEPS // 6,
        sample_every=STEPS // 2,
        checkpoint_every=10,
        num_workers=4,
        max_failures=-1,
        collective_timeout=HANG_SECONDS,
    )


class Server:
    """An MLflow server that may die and come back at its address."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url, self.process = url, process

    def kill_and_restart(self, seconds_away: float) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(seconds_away)
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            self.process.args, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    with mlflow_server.serve(f"sqlite:///{folder / 'server.db'}", folder / "artifacts") as (url, process):
        server = Server(url, process)
        try:
            yield server
        finally:
            mlflow_server.stop(server.process)


class Chaos:
    """Kills things of one run after the other until ``kills`` are done."""

    def __init__(self, cluster: Cluster, server: Server, config: PretrainConfig, home: Path) -> None:
        self.cluster, self.server, self.config, self.home = cluster, server, config, home
        self.choose = random.Random(SEED)
        self.events: list[Event] = []
        self.jobs: list[TrainingJob] = []
        self._stopped: list[psutil.Process] = []

    def run(self, kills: int) -> None:
        """Runs, one after the other, until there were enough kills; each is trained to its end."""
        kinds = list(itertools.islice(itertools.cycle(KINDS), kills))
        self.choose.shuffle(kinds)
        while kinds:
            name = f"chaos-{len(self.jobs)}"
            job = TrainingJob(self.cluster, dataclasses.replace(self.config, output=name), self.home)
            self.jobs.append(job)
            try:
                while kinds and self.kill(job, kinds[-1]):
                    kinds.pop()
                job.finish()
            finally:
                job.stop()
                for process in self._stopped:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def kill(self, job: TrainingJob, kind: str) -> bool:
        """One kill at a random moment; False where the run is about to end."""
        moment = "running" if kind in ("hang", "MLflow server") else self.choose.choice(MOMENTS)
        if not self.wait_for_moment(job, moment):
            return False
        event = Event(
            number=len(self.events) + 1,
            run=job.output.name,
            kind=kind,
            moment=moment,
            step=job.step(),
            time=time.time(),
        )
        self.strike(job, kind)
        self.events.append(event)
        logger.info("kill %d: %s, %s, at step %d of %s", event.number, kind, moment, event.step, event.run)
        return True

    def wait_for_moment(self, job: TrainingJob, moment: str) -> bool:
        """Come to the moment; False where the run is about to end."""
        if job.step() > STEPS - MARGIN:
            return False
        if moment == "starting" and self.events and self.events[-1].run == job.output.name:
            time.sleep(self.choose.uniform(0.5, 12))
        else:
            known = job.step()
            job.wait_for(lambda: job.step() > known, "a new step")
            time.sleep(self.choose.uniform(0, 3))
        if moment == "saving" and job.is_running:
            job.wait_for(lambda: is_saving(job.output / "checkpoints"), "a checkpoint being written", pause=0.001)
        return job.is_running and job.step() < STEPS

    def strike(self, job: TrainingJob, kind: str) -> None:
        if kind == "driver":
            job.driver.kill()
            job.driver.wait()
            job.start()
        elif kind == "node":
            node = self.choose.choice(sorted(self.cluster.worker_nodes, key=lambda node: str(node.node_id)))
            self.cluster.remove_node(node, allow_graceful=False)  # SIGKILL of its raylet
            self.cluster.add_node(num_cpus=CPUS_PER_NODE, **NODE)
        elif kind == "MLflow server":
            self.server.kill_and_restart(self.choose.uniform(0, 10))
        else:
            if kind == "hang":  # in the middle of a step: a checkpoint or an evaluation may take half an hour more
                known = job.step()
                job.wait_for(lambda: job.step() > known and job.step() % 10 in range(2, 7), "a step", pause=0.005)
            workers = job.wait_for(job.workers, "a worker")
            self.strike_workers(workers if kind == "all workers" else [self.choose.choice(workers)], kind)

    def strike_workers(self, victims: list[psutil.Process], kind: str) -> None:
        """SIGKILL, or SIGSTOP for a hang."""
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                if kind == "hang":
                    victim.suspend()
                    self._stopped.append(victim)
                else:
                    victim.kill()

    def measure(self) -> None:
        """Find out what every kill cost, now that the runs are over."""
        for job in self.jobs:
            events = [event for event in self.events if event.run == job.output.name]
            for event, following in itertools.zip_longest(events, events[1:]):
                # Workers outlive their driver by a moment, and may finish steps in it.
                begins = (at for at in job.starts() if at > event.time)
                again = event.time if event.kind == "MLflow server" else next(begins, event.time)
                done = max((step for step, at in job.steps() if at <= again), default=0)
                new = next(at for step, at in job.steps() if step > done and at > again)
                event.seconds_lost = round(new - event.time, 1)
                event.alone = following is None or following.time > new


def is_saving(folder: Path) -> bool:
    """Whether there is something beside the complete checkpoints."""
    return folder.exists() and any(re.fullmatch(r"step-\d+", entry.name) is None for entry in os.scandir(folder))


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end, every rank's part."""
    files = sorted((output / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def require_equal(job: TrainingJob, clean: TrainingJob) -> None:
    """Bit for bit: weights, optimizer state, every loss, val loss, the samples; every point once and in order."""
    expected, found = tensors(clean.output), tensors(job.output)
    assert expected.keys() == found.keys()
    assert any("optimizer" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert [step for step, _ in clean.history("train/loss")] == list(range(1, STEPS + 1))
    for metric in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "tokens_seen"):
        assert job.history(metric) == clean.history(metric), metric
    told = [[(entry["step"], entry["text"]) for entry in run.entries("sample")] for run in (job, clean)]
    assert told[0] == told[1] and len(told[0]) == 2


def report(events: list[Event]) -> None:
    for event in events:
        logger.info(json.dumps(asdict(event)))
    if path := os.environ.get("CHAOS_REPORT"):
        Path(path).write_text("".join(json.dumps(asdict(event)) + "\n" for event in events))


@pytest.mark.timeout(5400)
def test_kills(config: PretrainConfig, tmp_path: Path) -> None:
    with running_server(tmp_path) as server, running_cluster(CPUS_PER_NODE, CPUS_PER_NODE) as cluster:
        config = dataclasses.replace(config, tracking_uri=server.url)
        clean = TrainingJob(cluster, config, tmp_path)
        try:
            clean.finish()
        finally:
            clean.stop()
        chaos = Chaos(cluster, server, config, tmp_path)
        try:
            chaos.run(KILLS)
        finally:
            logger.info("CHAOS_SEED=%d, %d kills", SEED, len(chaos.events))
        mlflow_server.wait_until_healthy(server.url, server.process)
        for job in chaos.jobs:
            job.start()  # done: says so, and sends what MLflow was not there for
            job.finish()
            require_equal(job, clean)
    chaos.measure()
    report(chaos.events)
    assert len(chaos.events) == KILLS


def test_a_worker_killed_while_its_group_joins_leaves_no_places_taken(config: PretrainConfig, tmp_path: Path) -> None:
    """When it has imported numba: its process is there, the process group is not."""
    with running_cluster(CPUS_PER_NODE, CPUS_PER_NODE) as cluster:
        config = dataclasses.replace(config, output="joins", train_steps=12, val_every=12, sample_every=12)
        job = TrainingJob(cluster, config, tmp_path)
        try:
            victim = job.wait_for(lambda: next(filter(is_joining, job.workers()), None), "an import", pause=0.01)
            victim.kill()
            job.wait_for(job.step, "a step", seconds=90)
            job.finish()
        finally:
            job.stop()


def is_joining(process: psutil.Process) -> bool:
    try:
        return "llvmlite" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False
