"""Environment variables for processes that start or join a Ray of their own."""

from __future__ import annotations

import os

_KEPT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


def is_foreign(name: str) -> bool:
    """Whether a job of another test set this variable for its local Ray; token and loopback are the same for all."""
    return name.startswith("RAY_") and name not in _KEPT


def own_environment() -> dict[str, str]:
    """This process's variables without those that a job of another test set for its local Ray."""
    return {name: value for name, value in os.environ.items() if not is_foreign(name)}
