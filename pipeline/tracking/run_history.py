"""What a run's journal tells, as a reader wants it: settings, curves, samples, how long it took on how many workers."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.run_files import JOURNAL_FILE
from pipeline.storage.folders import Folder
from pipeline.tracking.journal import Entry, read_entries


@dataclass(kw_only=True)
class Story:
    """What a journal tells, as a reader wants it."""

    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Values by step."""
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    periods: list[tuple[float, float, int]] = field(default_factory=list)
    """Begin and end of each process, seconds since 1970, and its number of training workers."""

    @property
    def hours(self) -> float:
        return sum(end - begin for begin, end, _ in self.periods) / 3600

    @property
    def worker_hours(self) -> float:
        return sum((end - begin) * workers for begin, end, workers in self.periods) / 3600


def tell(entries: Iterable[Entry]) -> Story:
    """The story of a run."""
    story = Story()
    for entry in entries:
        _tell(story, entry)
    return story


def read_history(folder: Folder) -> Story:
    """The history of the run in ``folder``, on a disk or in a bucket; empty where it has no journal."""
    try:
        content = folder.read(JOURNAL_FILE)
    except FileNotFoundError:
        return Story()
    return tell(entry for entry, _ in read_entries(io.BytesIO(content), 0, len(content)))


def _tell(story: Story, entry: Mapping[str, Any]) -> None:
    kind, seconds = entry["kind"], entry["time"] / 1000
    if kind == "start" or not story.periods:
        story.periods.append((seconds, seconds, 1))
    begin, _, workers = story.periods[-1]
    if kind == "tags":
        story.tags.update(entry["values"])
        workers = int(entry["values"].get("workers", workers))
    story.periods[-1] = (begin, seconds, workers)
    if kind == "params":
        story.params.update(entry["values"])
    elif kind == "inputs":
        story.inputs = list(entry["values"])
    elif kind == "metrics":
        for name, value in entry["values"].items():
            story.metrics[name][entry["step"]] = value
    elif kind == "sample":
        story.samples.append((entry["step"], entry["prompt"], entry["text"]))
