"""What a run's journal records, in the form that the report and the model card need: settings, curves, samples, times.

Every line of the journal becomes part of a RunHistory. A point that was logged twice, by a process that died and by the
one that repeated its steps, is one point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.tracking.journal import Entry


@dataclass(kw_only=True)
class RunHistory:
    """The journal of one run, sorted by kind."""

    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Metric -> step -> value."""
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    """Step, prompt and generated text."""
    periods: list[tuple[float, float, int]] = field(default_factory=list)
    """Begin and end of each process, in seconds since 1970, and its number of training workers."""
    rollbacks: list[tuple[int, int, dict[str, tuple[Any, Any]]]] = field(default_factory=list)
    """The step that each rollback went back to, the last one done before, and the settings that changed."""

    @classmethod
    def from_journal(cls, entries: Iterable[Entry]) -> RunHistory:
        """The history that a journal's entries add up to."""
        history = cls()
        for entry in entries:
            history._add(entry)
        return history

    @property
    def hours(self) -> float:
        """Hours that processes of the run trained for."""
        return sum(end - begin for begin, end, _ in self.periods) / 3600

    @property
    def worker_hours(self) -> float:
        """Hours times workers, summed over the processes of the run."""
        return sum((end - begin) * workers for begin, end, workers in self.periods) / 3600

    def _add(self, entry: Mapping[str, Any]) -> None:
        kind, seconds = entry["kind"], entry["time"] / 1000
        if kind == "start" or not self.periods:
            self.periods.append((seconds, seconds, 1))
        begin, _, workers = self.periods[-1]
        if kind == "tags":
            self.tags.update(entry["values"])
            known = str(entry["values"].get("workers", ""))
            workers = int(known) if known.isascii() and known.isdigit() and len(known) < 10 else workers
        self.periods[-1] = (begin, seconds, workers)
        if kind == "params":
            self.params.update(entry["values"])
        elif kind == "inputs":
            self.inputs = list(entry["values"])
        elif kind == "metrics":
            for name, value in entry["values"].items():
                self.metrics[name][entry["step"]] = value
        elif kind == "sample":
            self.samples.append((entry["step"], entry["prompt"], entry["text"]))
        elif kind == "rollback":
            self._roll_back(entry["step"], entry["changed"])

    def _roll_back(self, step: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """Leave out what was told of steps after ``step``."""
        self.rollbacks.append((step, max(self.metrics["train/loss"], default=step), changed))
        for name, points in self.metrics.items():
            if not name.startswith("system/"):
                self.metrics[name] = {each: value for each, value in points.items() if each <= step}
        self.samples = [sample for sample in self.samples if sample[0] <= step]
