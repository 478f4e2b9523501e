"""The Tracker that the trainer logs to, and its subclass that passes everything on to several trackers.

A tracker needs nothing installed. The one of MLflow is in mlflow_tracker.py, that of Ray's dashboard in ray_metrics.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pipeline.storage.folders import Folder

Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """An input of a run: a data set or a tokenizer."""

    name: str
    fingerprint: str
    """sha256, hex."""
    source: str
    """Path or address."""
    context: str
    """Its use: training, validation or tokenizer."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Figures about it, for instance tokens and documents."""
    weight: float | None = None
    """Share of a mixture that it has in the first phase's tokens; None where it is not mixed."""


class Tracker:
    """Base class of trackers; this one ignores everything that is logged, and a subclass takes what it needs.

    No method raises because a server or a disk fails, and none waits for a server but ``finish``.
    """

    def log_start(self, step: int, settings: Mapping[str, Any], learning_rate: Callable[[int], float]) -> None:
        """Say after how many steps training begins, before anything else is logged.

        If later steps were logged before and ``settings``, which decide their numbers, or their learning rates (by
        step, counted from 0) were others, then those steps are told anew, and what was logged of them counts no more.
        """

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the settings of the run."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Log commit, versions and hardware, which may change when the run is restarted."""

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        """Log the data sets and the tokenizer of the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log points of curves. A point of a step that was logged before, by a process that died, is the same point."""

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Log a generated text, which includes its prompt."""

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        """Log a new checkpoint, or further metrics of one that was logged before.

        ``best`` says that its val loss is the lowest of the run so far.
        """

    def log_file(self, path: Path) -> None:
        """Log a file of this node, which must not be removed before ``finish``."""

    def log_page(self, name: str) -> None:
        """Log a file of the run folder, on a disk or in a bucket, by its name there."""

    def flush(self) -> None:
        """Return when everything logged so far would survive the end of this process."""

    def finish(self, status: Status) -> None:
        """End the run; waits some seconds for entries that have not been sent yet."""


class Trackers(Tracker):
    """Several trackers as one; every call reaches them in the order given."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers


def _each(name: str) -> Callable[..., None]:
    """A method of Trackers that calls the method ``name`` of each of its trackers."""

    def call_each(self: Trackers, *values: Any, **options: Any) -> None:
        for tracker in self.trackers:
            getattr(tracker, name)(*values, **options)

    return call_each


for _name in [name for name in vars(Tracker) if not name.startswith("_")]:
    setattr(Trackers, _name, _each(_name))


def log_files(tracker: Tracker, folder: Folder, *names: str) -> None:
    """Log copies of files of a folder, which may be in a bucket."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            path = Path(temporary) / name
            path.write_bytes(folder.read(name))
            tracker.log_file(path)
