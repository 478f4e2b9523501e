"""The commit and the library versions that a run is made with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

COMMIT_VARIABLE = "GPT25_COMMIT"
"""Environment variable that names the commit of a submitted job: Ray's copy of the project has no .git."""

_PACKAGES = ("torch", "ray", "mlflow", "numpy", "numba", "safetensors")


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The commit of this checkout, followed by "+changes" where files differ from it; "unknown" without git."""
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
    """Versions of Python and of those packages of the project that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
