"""Which run a run began from: run.json in its folder, and whether the folder is a copy of another run's.

A branch (jobs/pretrain.py --branch_from) and a copy are runs of their own; MLflow shows the same link as tags.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_files import MLFLOW_RUN_FILE, RUN_FILE
from pipeline.storage.folders import Folder, LocalFolder, is_url, open_folder
from pipeline.storage.json_files import parse_json, read_json, write_json
from pipeline.tracking.journal import read_journal


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The run that another one began from."""

    folder: str
    """Address of its folder."""
    step: int
    """Optimizer steps that it had done there."""
    run_id: str | None = None
    """Its run of MLflow, if it has one."""

    def tags(self) -> dict[str, str]:
        """The link as tags of a run of MLflow."""
        return branch_tags(self.run_id or self.folder, self.step) | {"branched_from_folder": self.folder}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The content of run.json."""

    parent: Parent


def branch_tags(parent: str, step: int) -> dict[str, str]:
    """The tags of a run of MLflow that goes on from step ``step`` of the run ``parent``."""
    return {"branched_from": parent, "branched_at_step": str(step)}


def read_parent(folder: Folder) -> Parent | None:
    """The run that the run in ``folder`` began from; None for one that began anew."""
    run = read_json(folder, RUN_FILE, _Run, mend="delete it; the run goes on without naming its parent")
    return run.parent if run else None


def write_parent(folder: Folder, parent: Parent) -> None:
    write_json(folder, RUN_FILE, asdict(_Run(parent=parent)))


def last_step(folder: Folder) -> int:
    """The last optimizer step that the journal in ``folder`` tells of, on the branch that counts; 0 without any."""
    last = 0
    for entry in read_journal(folder):
        if entry["kind"] == "rollback":
            last = min(last, entry["step"])
        elif entry["kind"] == "metrics" and "train/loss" in entry["values"]:
            last = max(last, entry["step"])
    return last


def is_copy(folder: Folder, original: str, run_id: str) -> bool:
    """Whether ``folder`` is a copy of the folder at ``original``, to which MLflow's run ``run_id`` belongs.

    A folder that was moved, or is seen under another name, is none: then there is no other one with that run.
    """
    if not original or original == folder.url:
        return False
    with contextlib.suppress(UserError, OSError, ValueError, LookupError, TypeError):
        other = open_folder(original)
        if _bucket(original) != _bucket(folder.url) or _same(folder, other):
            return False
        record = parse_json(other.read(MLFLOW_RUN_FILE), dict[str, object])
        return record["run_id"] == run_id and record.get("folder", original) == original
    return False


def _bucket(address: str) -> str:
    """The bucket of an address, empty for a path: a foreign record is not followed into another one."""
    return "/".join(address.split("/", 3)[:3]) if is_url(address) else ""


def _same(one: Folder, other: Folder) -> bool:
    return isinstance(one, LocalFolder) and Path(one.url).samefile(other.url)
