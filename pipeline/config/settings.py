"""Shared by the settings of all jobs: checks of values, and their plain form for MLflow, checkpoints and --dry_run."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import UserError
from pipeline.paths import without_password


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first of these fields that is given and not above zero."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} is {value}; it must be positive")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain values without passwords: for MLflow, checkpoints and --dry_run."""
    values = dataclasses.asdict(config)
    if values.get("tracking_uri"):
        values["tracking_uri"] = without_password(values["tracking_uri"])
    return values
