"""CPU, memory, disk, network and GPU figures of this node every few seconds, under MLflow's names: system/...

Not MLflow's own monitor: that one sends its figures itself, waits for the server, and stops for good at the first
error. This one passes them to a callback, which writes them to the run's journal.
"""

from __future__ import annotations

import contextlib
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
        except ImportError:
            return
        gpus = _open_gpus()
        network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call has no earlier one to compare with
        while not self._stopped.wait(self._interval):
            figures = _node(psutil, network) | _gpu_figures(gpus)
            self._report({f"system/{name}": value for name, value in figures.items()})


def _node(psutil: Any, network_before: Any) -> dict[str, float]:
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    if network and network_before:
        figures["network_receive_megabytes"] = (network.bytes_recv - network_before.bytes_recv) / 1e6
        figures["network_transmit_megabytes"] = (network.bytes_sent - network_before.bytes_sent) / 1e6
    return figures


def _open_gpus() -> list[Any]:
    """The NVIDIA devices of this node; none where nvidia-ml-py or a driver is missing."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        logger.debug("no GPU is measured: %s", error)
        return []


def _gpu_figures(gpus: list[Any]) -> dict[str, float]:
    if not gpus:
        return {}
    import pynvml

    figures: dict[str, float] = {}
    for index, gpu in enumerate(gpus):
        with contextlib.suppress(pynvml.NVMLError):  # this GPU does not report this figure
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            figures[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            figures[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with contextlib.suppress(pynvml.NVMLError):
            figures[f"gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        with contextlib.suppress(pynvml.NVMLError):
            figures[f"gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return figures
