"""CPU, memory, disk, network and GPU figures of this node, as they reach the run's journal."""

from __future__ import annotations

import queue
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mlflow.system_metrics.metrics import gpu_monitor

from pipeline.tracking import system_metrics
from pipeline.tracking.system_metrics import SystemSampler


def figures(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, float]:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    reported: queue.Queue[Mapping[str, float]] = queue.Queue()
    sampler = SystemSampler(reported.put)
    try:
        return reported.get(timeout=1200)
    finally:
        sampler.stop()


def test_the_figures_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(monkeypatch)
    expected = {
        *("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"),
        *("disk_usage_percentage", "network_receive_megabytes", "network_transmit_megabytes"),
        "process_memory_megabytes",
    }
    assert {f"system/{name}" for name in expected} <= found.keys()
    total = psutil.virtual_memory().total / 1e6
    assert 0 < found["system/process_memory_megabytes"] < found["system/system_memory_usage_megabytes"] < total
    assert 0 < found["system/disk_usage_percentage"] <= 100


def test_the_figures_of_a_gpu_that_lacks_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NVMLError(Exception):
        pass

    def lacking(*_: Any) -> Any:
        raise NVMLError("not supported")

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2e9, total=8e9),
        nvmlDeviceGetUtilizationRates=lacking,
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 500_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    found = {name: value for name, value in figures(monkeypatch).items() if "gpu" in name}
    assert found == {
        "system/gpu_0_memory_usage_megabytes": 2000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_power_usage_watts": 250.0,
        "system/gpu_0_power_usage_percentage": 50.0,
    }
    assert not caplog.records


def test_a_node_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(gpu_monitor, "GPUMonitor", refuse)
    assert [type(monitor).__name__ for monitor in system_metrics._monitors()] == [
        *("CPUMonitor", "DiskMonitor", "NetworkMonitor"),
    ]
