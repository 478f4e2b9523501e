"""Seconds that a start takes, or a new start after a loss, part by part until the first step is done.

The parts of a group of workers under Ray, in order: "shutdown" of the group before it (only after a loss or a resize),
"processes" (Ray starts them), "imports", "process group". Then the parts of the trainer, with or without Ray: "data",
"model", "checkpoint", "first step", which includes compiling.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

_MARKS = "GPT25_STARTUP"


class StartupTimer:
    """Measures the parts of a start; each mark ends one.

    Args:
        began: time.time() when the loss was noticed or the program began. If not given, now.
        again: whether this replaces a group that was lost or is resized.
    """

    def __init__(self, began: float | None = None, *, again: bool = False) -> None:
        self.again = again
        self.parts: dict[str, float] = {}
        """Seconds of every part so far, in order."""
        self._since = time.time() if began is None else began

    def mark(self, part: str, at: float | None = None) -> None:
        """End ``part``, which began at the mark before."""
        now = time.time() if at is None else at
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def line(self) -> str:
        """``recovered in 21.3 s: shutdown 0.4, processes 6.1, ...``"""
        what = "recovered" if self.again else "started"
        return f"{what} in {self.seconds:.1f} s: " + ", ".join(
            f"{part} {seconds:.1f}" for part, seconds in self.parts.items()
        )

    def metrics(self) -> dict[str, float]:
        """The metric recovery/seconds and one per part; empty for a first start."""
        if not self.again:
            return {}
        figures = {f"recovery/{part.replace(' ', '_')}_seconds": seconds for part, seconds in self.parts.items()}
        return {"recovery/seconds": self.seconds, **figures}

    @classmethod
    def from_environment(cls) -> StartupTimer:
        """The timer of this worker's group, whose marks ``export_marks`` has left in the environment."""
        exported = json.loads(os.environ[_MARKS])
        (_, began), *marks = exported["stamps"]
        timer = cls(began, again=exported["again"])
        for part, at in marks:
            timer.mark(part, at)
        return timer


def export_marks(marks: Sequence[tuple[str, float]], again: bool) -> None:
    """Set in this worker's environment how long the start of its group has taken.

    Args:
        marks: (part, time.time() at its end); the first one is the beginning, and its name does not count.
        again: whether the group replaces one that was lost or is resized.
    """
    os.environ[_MARKS] = json.dumps({"stamps": list(marks), "again": again})
