"""The commit, the library versions and the hardware of a run, as MLflow tags. Needs nothing but torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.versions import commit, versions


def hardware_tags(workers: ProcessGroup) -> dict[str, str]:
    """Tags with the commit, the number of workers and nodes, the hardware of this rank's node, and library versions."""
    nodes = -(-workers.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", workers.world_size)))
    return {
        "commit": commit(),
        "workers": str(workers.world_size),
        "hardware.nodes": str(nodes),
        **{f"hardware.{name}": value for name, value in _hardware(workers.device).items()},
        **{f"version.{name}": value for name, value in versions().items()},
    }


def _hardware(device: torch.device) -> dict[str, str]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = {"cpu": _cpu_model(), "cpus": str(os.cpu_count() or 1), "memory_gib": f"{memory_bytes / 2**30:.0f}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "gpu": properties.name,
            "gpus": str(torch.cuda.device_count()),
            "gpu_memory_gib": f"{properties.total_memory / 2**30:.0f}",
        }
    return values


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
