"""What is known of every trial of a sweep, and the files that say so, in the folder of the sweep:

<sweep>/
    plan.json           the trials and their settings; written once
    results.json        status, steps and val loss of every trial; with the run folders it is the truth of a sweep
    results.csv         the same as a table
    report.html  curves.png    the report, and the curves of all trials as a picture
    trial-000/  ...     the run folder of each trial

A trial is finished if its run folder says so, and was stopped early if results.json says so. All others have a turn
when the sweep goes on; their training resumes from its newest checkpoint. Nothing of Ray Tune is read again.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.config.settings import to_dict
from pipeline.errors import UserError
from pipeline.run_files import REPORT_FILE
from pipeline.storage.folders import Folder, open_folder
from pipeline.sweep.trials import Trial
from pipeline.tracking.journal import read_journal
from pipeline.tracking.run_history import RunHistory

PLAN_FILE, RESULTS_FILE, TABLE_FILE = "plan.json", "results.json", "results.csv"
_MAY_CHANGE = {
    *("output", "tracking_uri", "dry_run", "registered_model", "price_per_hour", "experiment", "num_workers", "device"),
    *("max_failures", "collective_timeout", "resize_seconds"),
}
"""Settings that another start of the sweep may have differently, because training goes on with them as well."""

Status = Literal["waiting", "running", "finished", "stopped early", "failed", "interrupted"]


@dataclass(kw_only=True)
class Result:
    """The state of one trial."""

    name: str
    varied: dict[str, str]
    status: Status = "waiting"
    steps: int = 0
    """Optimizer steps done."""
    val_loss: float | None = None
    """The last validation loss, nats per token."""
    best_val_loss: float | None = None
    """The lowest validation loss, nats per token."""
    error: str = ""
    """Why it failed, in one sentence."""

    @property
    def has_ended(self) -> bool:
        """Whether it stays as it is when the sweep goes on."""
        return self.status in ("finished", "stopped early")

    def take(self, step: int, val_loss: float | None) -> None:
        """Note what the trial reported."""
        self.steps = max(self.steps, step)
        if val_loss is not None and step == self.steps:
            self.val_loss = val_loss
            self.best_val_loss = min(val_loss, self.best_val_loss if self.best_val_loss is not None else math.inf)


def _is_plan(values: Any) -> bool:
    kinds = {"varied": dict, "settings": dict}
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(entry, dict) for entry in values)
        and all(isinstance(entry.get(name), kind) for entry in values for name, kind in kinds.items())
    )


def check_plan(output: Folder, trials: Sequence[Trial]) -> None:
    """Write the plan at the first start of a sweep; later, check that the trials are the same.

    Raises:
        UserError: the folder holds a sweep of other trials, or of other settings.
    """
    entries = [{"name": t.name, "varied": t.varied, "settings": to_dict(t.config)} for t in trials]
    plan: list[dict[str, Any]] = json.loads(json.dumps(entries))  # as it is read again: tuples are lists
    try:
        before = json.loads(output.read(PLAN_FILE))
    except FileNotFoundError:
        for name in (RESULTS_FILE, TABLE_FILE, REPORT_FILE):
            if output.size(name) is not None:
                raise UserError(
                    f"output folder {output} holds a {name} and no sweep, which would replace it; choose another "
                    "--output"
                ) from None
        output.make()
        output.write(PLAN_FILE, [json.dumps(plan, indent=1).encode()])
        return
    except ValueError:
        before = None
    if not _is_plan(before):
        raise UserError(f"{output}/{PLAN_FILE} is not the plan of a sweep; choose another --output")
    if [trial["varied"] for trial in before] != [trial["varied"] for trial in plan]:
        raise UserError(
            f"{output} holds a sweep of other trials ({len(before)} of {', '.join(before[0]['varied'])}); give the "
            "--vary, --search, --num_trials and --search_seed of before, or a new --output"
        )
    for old, new in zip(before, plan, strict=True):
        for name, value in new["settings"].items():
            was = old["settings"].get(name, value)
            if was != value and name not in _MAY_CHANGE:
                raise UserError(
                    f"{output} holds a sweep with {name} {was}, now it is {value}; give the {name} of before, or a new "
                    "--output"
                )


def read_results(output: Folder, trials: Sequence[Trial]) -> list[Result]:
    """The state of every trial as results.json has it; those that were running then have been interrupted."""
    try:
        known = {entry["name"]: entry for entry in json.loads(output.read(RESULTS_FILE))}
    except FileNotFoundError:
        known = {}
    results = []
    for trial in trials:
        result = Result(**known.get(trial.name, {"name": trial.name, "varied": trial.varied}))
        if result.status == "running":
            result.status = "interrupted"
        results.append(result)
    return results


def write_results(output: Folder, results: Sequence[Result]) -> None:
    """Write results.json and results.csv."""
    output.write(RESULTS_FILE, [json.dumps([asdict(result) for result in results], indent=1).encode()])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *results[0].varied, "status", "steps", "val_loss", "best_val_loss", "error"])
    for result in results:
        losses = ["" if loss is None else repr(loss) for loss in (result.val_loss, result.best_val_loss)]
        writer.writerow([result.name, *result.varied.values(), result.status, result.steps, *losses, result.error])
    output.write(TABLE_FILE, [text.getvalue().encode()])


def val_losses(output: Folder, name: str) -> list[tuple[int, float]]:
    """Steps and val losses that a trial has logged, by step."""
    history = RunHistory.from_journal(read_journal(open_folder(f"{output}/{name}")))
    return sorted(history.metrics["val/loss"].items())


def ranked(results: Sequence[Result]) -> list[Result]:
    """Finished trials first, the lowest val loss first; then the others."""
    order: dict[Any, int] = {"finished": 0, "stopped early": 1}
    return sorted(
        results,
        key=lambda result: (order.get(result.status, 2), math.inf if result.val_loss is None else result.val_loss),
    )


def best_of(results: Sequence[Result]) -> Result | None:
    """The finished trial with the lowest last val loss; None before one has finished."""
    first = ranked(results)[0]
    return first if first.status == "finished" and first.val_loss is not None else None


def table(results: Sequence[Result]) -> list[str]:
    """Lines of a table for the terminal, the best trial first."""
    rows = [["trial", *results[0].varied, "status", "steps", "val loss"]]
    for result in ranked(results):
        loss = "" if result.val_loss is None else f"{result.val_loss:.4f}"
        rows.append([result.name, *result.varied.values(), result.status, f"{result.steps:,}", loss])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
