"""A run's figures at the Prometheus endpoint of a real Ray node, where its dashboard finds them."""

from __future__ import annotations

import re
import time
import urllib.request
from typing import Any

import pytest

from pipeline.tracking.ray_metrics import RayMetrics, gauge_name

pytestmark = pytest.mark.usefixtures("local_ray")


def scrape() -> str:
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def gauges(text: str, run: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if line.startswith("ray_gpt25_") and f'run="{run}"' in line)
    matches = (re.match(r"ray_(\w+)\{.*\} (\S+)$", line) for line in lines)
    return {match[1]: float(match[2]) for match in matches if match}


@pytest.mark.slow
def test_figures_of_a_run_are_at_the_node_s_endpoint() -> None:
    import ray

    @ray.remote
    class Worker:
        def __init__(self) -> None:
            self.tracker: Any = RayMetrics("my run")

        def log(self, value: float, step: int) -> None:
            self.tracker.log_metrics({"train/loss": value, "perf/tokens_per_second": 1000.0}, step)

    worker = Worker.remote()  # type: ignore[attr-defined]
    ray.get(worker.log.remote(3.0, 1))
    ray.get(worker.log.remote(2.5, 2))
    expected = {gauge_name("train/loss"): 2.5, gauge_name("perf/tokens_per_second"): 1000.0, gauge_name("step"): 2.0}
    found: dict[str, float] = {}
    for _ in range(120):
        found = gauges(scrape(), "my run")
        if found == expected:
            break
        time.sleep(0.5)
    assert found == expected
