"""Shared by the settings of all jobs: checks of values, and their plain form for MLflow, checkpoints and --dry_run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.redaction import redact

_LARGEST = 2**53  # above it a float cannot tell one whole number from the next


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first of these fields that is given and not above zero."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} is {value}; it must be positive")


def require_plain(config: Any, *, seeds: Sequence[str] = (), free: Sequence[str] = ()) -> None:
    """Raise UserError for the first field whose value no setting can have, whatever the field means.

    Numbers must be finite and whole ones at most 2**53; seeds at least 0 and below 2**63; texts must not be empty.

    Args:
        seeds: fields that are random seeds.
        free: fields that are checked elsewhere.
    """
    for name in (field.name for field in dataclasses.fields(config) if field.name not in free):
        value = getattr(config, name)
        if name in seeds:
            require(0 <= value < 2**63, f"{name} is {value}; it must lie between 0 and {2**63 - 1}")
        elif isinstance(value, str):
            require(bool(value.strip()), f"{name} is empty; give a value, or leave it out")
            require("\0" not in value, f"{name} is {value!r}; it must not hold a zero byte")
        else:
            for number in value if isinstance(value, tuple) else (value,):
                _require_number(name, number)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}; it must be a finite number")
    elif isinstance(value, int):
        require(abs(value) <= _LARGEST, f"{name} is {value}; it must be at most {_LARGEST:,}")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain values without passwords: for MLflow, checkpoints and --dry_run."""
    return {name: _redacted(value) for name, value in dataclasses.asdict(config).items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: _redacted(inner) for name, inner in value.items()}
    return type(value)(map(_redacted, value)) if isinstance(value, list | tuple) else value
