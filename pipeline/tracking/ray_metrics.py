"""The metrics of a run as Ray's own metrics, which its dashboard and every node's Prometheus endpoint show.

``train/loss`` becomes the gauge ``gpt25_train_loss`` (Ray prefixes it with ``ray_``), with the run's name as a tag. Ray
exports the last value of a gauge every few seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.tracking.tracker import Tracker

_DESCRIPTIONS = {
    "train/loss": "training loss, nats per token",
    "train/grad_norm": "global gradient norm before clipping",
    "train/lr": "learning rate",
    "val/loss": "validation loss, nats per token",
    "perf/tokens_per_second": "training tokens per second over all workers",
    "perf/mfu": "model FLOPs utilisation",
    "perf/step_seconds": "seconds per optimizer step",
    "perf/data_wait_seconds": "seconds per step that rank 0 waited for batches",
    "perf/checkpoint_stall_seconds": "seconds that training waited for the last checkpoint",
    "step": "optimizer steps done",
}


class RayMetrics(Tracker):
    """Sets one gauge for each metric, tagged with the name of the run, in a process that Ray started."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Any] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in {**metrics, "step": step}.items():
            self._gauge(name).set(float(value), tags=self._tags)

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            description = _DESCRIPTIONS.get(name, name)
            self._gauges[name] = Gauge(gauge_name(name), description=description, tag_keys=("run",))
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """Name of a metric in Ray, with the letters, digits and underscores that Prometheus allows."""
    return f"gpt25_{re.sub('[^A-Za-z0-9_]', '_', metric)}"
