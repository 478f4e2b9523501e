"""The nodes that an estimate is for: NUMBERxCPUS, or the worker types of a Ray cluster file."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.paths import working_folder

DEFAULT_FILE = "cluster.yaml"
_NUMBERS = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,4})")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes of a cluster that tokenization may use."""

    count: int
    cpus: int
    """CPUs for tasks of all nodes together."""
    source: str
    """Where that is said, for a message."""
    idle_seconds: float = 0.0
    """Seconds for which a node without work is kept, and paid for."""


def find_nodes(wanted: str | None) -> Nodes | None:
    """The nodes that the settings name; None where they name none and no cluster.yaml of the current folder does.

    Raises:
        UserError: the words are neither NUMBERxCPUS nor a cluster file that says how many CPUs its workers have.
    """
    if wanted is not None and (match := _NUMBERS.fullmatch(wanted)):
        count, cpus = int(match[1]), int(match[2])
        return Nodes(count=count, cpus=count * cpus, source="--nodes")
    if wanted is not None:
        return _of_file(working_folder() / Path(wanted).expanduser(), wanted)
    with contextlib.suppress(UserError):  # that of another project, perhaps
        return _of_file(working_folder() / DEFAULT_FILE, DEFAULT_FILE)
    return None


def _of_file(path: Path, name: str) -> Nodes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"nodes: {path} is too large for a cluster file; give one, or NUMBERxCPUS such as 8x16")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"nodes: {path} is no cluster file, and no NUMBERxCPUS such as 8x16: {reason}") from error
    workers = _workers(document)
    if not workers:
        raise UserError(
            f"nodes: {path} names no worker nodes with CPUs for tasks; give NUMBERxCPUS, such as --nodes 8x16"
        )
    return Nodes(
        count=sum(count for count, _ in workers),
        cpus=sum(count * cpus for count, cpus in workers),
        source=name,
        idle_seconds=60.0 * _number(document.get("idle_timeout_minutes")),
    )


def _workers(document: Any) -> list[tuple[int, int]]:
    """Number of nodes and CPUs of each worker type without a GPU, at most as many as the file allows."""
    types = document.get("available_node_types") if isinstance(document, dict) else None
    if not isinstance(types, dict):
        return []
    found = []
    for name, values in types.items():
        resources = values.get("resources") if isinstance(values, dict) else None
        if name == document.get("head_node_type") or not isinstance(resources, dict) or _number(resources.get("GPU")):
            continue
        count, cpus = int(_number(values.get("max_workers"))), int(_number(resources.get("CPU")))
        if count and cpus:
            found.append((count, cpus))
    return found


def _number(value: Any) -> float:
    return max(0.0, float(value)) if isinstance(value, int | float) and value < 1 << 40 else 0.0
