"""What a run is made by: commit, versions of the libraries, hardware. Needs nothing but torch."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from pipeline.distributed.fsdp import Workers

COMMIT_VARIABLE = "GPT25_COMMIT"
"""Set by who submits a job: Ray's uploaded copy of the project has no .git."""

_PACKAGES = ("torch", "ray", "mlflow", "numpy", "numba", "safetensors")


def describe(workers: Workers) -> dict[str, str]:
    """Names and values, all text; the hardware is that of this rank's node."""
    nodes = -(-workers.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", workers.world_size)))
    return {
        "commit": commit(),
        "workers": str(workers.world_size),
        "hardware.nodes": str(nodes),
        **{f"hardware.{name}": value for name, value in _hardware(workers.device).items()},
        **{f"version.{name}": value for name, value in versions().items()},
    }


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The commit of this project's checkout, "+changes" behind it where files differ; "unknown" where there is none."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of Python, and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device) -> dict[str, str]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": _cpu_model(), "cpus": str(os.cpu_count() or 1), "memory_gib": f"{memory_bytes / 2**30:.0f}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpus": str(torch.cuda.device_count()),
            "gpu_memory_gib": f"{properties.total_memory / 2**30:.0f}",
        }
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
