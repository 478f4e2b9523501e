"""Shared by the settings of all jobs: checks of values, and their plain form for MLflow, checkpoints and --dry_run."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import UserError
from pipeline.redaction import redact


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
    return {name: _redacted(value) for name, value in dataclasses.asdict(config).items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: _redacted(inner) for name, inner in value.items()}
    return type(value)(map(_redacted, value)) if isinstance(value, list | tuple) else value
