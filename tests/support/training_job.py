"""A training job as a user has it, ``python jobs/pretrain.py``, on a cluster of several nodes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from tests.support.fixtures import ROOT
from tests.support.ray_environment import is_foreign, own_environment

NODE: dict[str, Any] = {"object_store_memory": 100_000_000}
WAIT_SECONDS = 1200


@contextlib.contextmanager
def running_cluster(*cpus: int) -> Iterator[Cluster]:
    """A head without CPUs, where the jobs' drivers are, and a node per number of CPUs; nobody is connected."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(is_foreign, [*os.environ]):
            patch.delenv(name)  # the nodes would inherit it
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("ray._private.utils.write_ray_address", "ray._common.utils.reset_ray_address"):
            patch.setattr(name, lambda *values: None)  # else every ray.init() on this machine would join the cluster
        head = {**NODE, "num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for count in cpus:
                cluster.add_node(num_cpus=count, **NODE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


class TrainingJob:
    """One run's folder, the command that trains it, its processes and what it has told."""

    def __init__(self, cluster: Cluster, config: PretrainConfig, home: Path) -> None:
        self.cluster, self.output = cluster, home / config.output
        self.log_path = home / f"{config.output}.log"
        changed = {name: value for name, value in to_dict(config).items() if value != getattr(PretrainConfig(), name)}
        self.command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *(f"--{n}={v}" for n, v in changed.items())]
        settings = {"RAY_ADDRESS": cluster.address, "GPT25_HOME": str(home), "TMPDIR": str(home)}
        self.environment = own_environment() | settings
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The same command, a first time or again."""
        with self.log_path.open("ab") as log:
            self.driver = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.driver

    @property
    def is_running(self) -> bool:
        return self.driver.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Whole lines of the run's journal."""
        path = self.output / "tracking.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

    def steps(self) -> list[tuple[int, float]]:
        """(steps done, time.time()) of every new step that the journal has."""
        points = (entry for entry in self.entries("metrics") if "train/loss" in entry["values"])
        return [(entry["step"], entry["time"] / 1000) for entry in points]

    def step(self) -> int:
        """Steps done, in any life of the run."""
        return self.steps()[-1][0] if self.steps() else 0

    def starts(self) -> list[float]:
        """When a rank 0 began, time.time() each."""
        return [entry["time"] / 1000 for entry in self.entries("start")]

    def workers(self) -> list[psutil.Process]:
        """The training workers that there are now, on any node."""
        found = []
        for node in self.cluster.list_all_nodes():
            for raylet in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += psutil.Process(raylet.process.pid).children(recursive=True)
        return sorted(filter(_is_training, found), key=lambda process: process.pid)

    def wait_for(
        self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS, pause: float = 0.05
    ) -> Any:
        """What ``condition`` gives, as soon as it is true; the job must not end before."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.is_running, f"the job ended with {self.driver.poll()} before {what}\n{self.log()[-5000:]}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{self.log()[-5000:]}"
            time.sleep(pause)
        return found

    def finish(self, seconds: float = 900) -> None:
        """Wait for the job's good end."""
        status = self.driver.wait(seconds)
        assert status == 0, f"the job ended with {status}\n{self.log()[-5000:]}"

    def stop(self) -> None:
        """Whatever is left of it."""
        if self.is_running:
            self.driver.kill()
        self.driver.wait()

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point that MLflow has, in MLflow's order."""
        run = json.loads((self.output / "mlflow_run.json").read_text())
        points = MlflowClient(run["tracking_uri"]).get_metric_history(run["run_id"], metric)
        return [(point.step, point.value) for point in points]


def _is_training(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
