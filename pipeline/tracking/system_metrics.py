"""CPU, memory, disk, network and GPU figures of this node every few seconds, under MLflow's names: system/...

MLflow's monitors measure, but not its thread: that one sends the figures itself, waits for the server, and stops for
good at the first error. This one passes them to a callback, which writes them to the run's journal.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

_INTERVAL_VARIABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
_INTERVAL_SECONDS = 10.0


class SystemSampler:
    """A thread that calls ``report`` with figures until ``stop`` is called; never where psutil is not installed."""

    def __init__(self, report: Callable[[Mapping[str, float]], None]) -> None:
        self._report = report
        self._stopped = threading.Event()
        self._interval = float(os.environ.get(_INTERVAL_VARIABLE) or _INTERVAL_SECONDS)
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        try:
            import psutil

            monitors = _monitors()
        except ImportError:
            return
        while not self._stopped.wait(self._interval):
            figures = {"process_memory_megabytes": psutil.Process().memory_info().rss / 1e6}
            for monitor in monitors:
                monitor.collect_metrics()
                figures |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._report({f"system/{name}": value for name, value in figures.items()})


def _monitors() -> list[Any]:
    """MLflow's monitors of this node; without that of NVIDIA GPUs where nvidia-ml-py or a driver is missing."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # at every period, of figures that a GPU lacks
    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        return [*monitors, GPUMonitor()]
    except (ImportError, RuntimeError) as error:
        logger.debug("no GPU is measured: %s", error)
        return monitors
