"""What a run tells the outside: the Tracker protocol that the trainer sees, and trackers that need nothing installed.

MLflow's is in mlflow_tracker.py, that of Ray's dashboard in ray_metrics.py; ``Trackers`` makes one of several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from pipeline.storage.folders import Folder

Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """Something the run was made from: a data set or a tokenizer."""

    name: str
    fingerprint: str
    """sha256, hex."""
    source: str
    """Path or address."""
    context: str
    """What for: training, validation, tokenizer."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Figures about it, for instance tokens and documents."""


class Tracker(Protocol):
    """What a run tells the outside. No method raises because of the outside, none waits for it but ``finish``."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """What a run is made by: commit, versions, hardware. May differ after a restart."""

    def log_inputs(self, inputs: Sequence[RunInput]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Points of curves. A point whose step was told before, by a process that died, is the same point."""

    def log_sample(self, step: int, prompt: str, text: str) -> None: ...

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        """A checkpoint is saved, or more is known of one told before; best: its val loss is the lowest so far."""

    def log_file(self, path: Path) -> None:
        """A file of the run's folder, which stays there."""

    def log_page(self, name: str) -> None:
        """A file of the run's folder, by its name there, on a disk or in a bucket; it stays there."""

    def flush(self) -> None:
        """What was told outlasts the end of this process."""

    def finish(self, status: Status) -> None:
        """Nothing more comes. Waits some seconds for what is still on its way."""


class SilentTracker:
    """Takes everything and does nothing; base class of trackers that want a part of it."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        pass

    def log_file(self, path: Path) -> None:
        pass

    def log_page(self, name: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def finish(self, status: Status) -> None:
        pass


class MemoryTracker(SilentTracker):
    """Keeps everything in attributes: for tests, and for runs where MLflow is not installed."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        self.inputs: list[RunInput] = []
        self.metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.samples: list[tuple[int, str, str]] = []
        self.checkpoints: list[tuple[int, Path | Folder]] = []
        self.checkpoint_metrics: dict[int, dict[str, float]] = defaultdict(dict)
        self.best: int | None = None
        """Step of the best checkpoint."""
        self.files: list[Path] = []
        self.pages: list[str] = []
        self.status: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params.update(params)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        self.inputs.extend(inputs)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.metrics[name].append((step, value))

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        self.samples.append((step, prompt, text))

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        if step not in self.checkpoint_metrics:
            self.checkpoints.append((step, path))
        self.checkpoint_metrics[step].update(metrics)
        if best:
            self.best = step

    def log_file(self, path: Path) -> None:
        self.files.append(path)

    def log_page(self, name: str) -> None:
        self.pages.append(name)

    def finish(self, status: Status) -> None:
        self.status = status


class Trackers:
    """Several trackers as one; the first is told first."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log_params(self, params: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log_params(params)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        for tracker in self._trackers:
            tracker.log_tags(tags)

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        for tracker in self._trackers:
            tracker.log_inputs(inputs)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log_metrics(metrics, step)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        for tracker in self._trackers:
            tracker.log_sample(step, prompt, text)

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        for tracker in self._trackers:
            tracker.log_checkpoint(step, path, metrics, best=best)

    def log_file(self, path: Path) -> None:
        for tracker in self._trackers:
            tracker.log_file(path)

    def log_page(self, name: str) -> None:
        for tracker in self._trackers:
            tracker.log_page(name)

    def flush(self) -> None:
        for tracker in self._trackers:
            tracker.flush()

    def finish(self, status: Status) -> None:
        for tracker in self._trackers:
            tracker.finish(status)
