"""A tracker that keeps in attributes what a trainer logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.folders import Folder
from pipeline.tracking.tracker import RunInput, Status, Tracker


class MemoryTracker(Tracker):
    """Keeps everything that is logged in attributes."""

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
