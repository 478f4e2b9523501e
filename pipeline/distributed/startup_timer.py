"""What starting costs, and starting again after a loss: seconds by part, until the first step is done.

The parts of a group of workers under Ray, in this order: "shutdown" of what is left of the group before it (only after
a loss or a resize), "processes" (Ray starts them), "imports", "process group"; and of the trainer, with or without
Ray: "data", "model", "checkpoint", "first step", which includes compiling.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

_STAMPS = "GPT25_STARTUP"


class StartUp:
    """Counts from ``began`` (time.time()); each mark ends a part.

    Args:
        began: when the loss was noticed, or the program began. Not given: now.
        again: whether this replaces a group that was lost or is resized.
    """

    def __init__(self, began: float | None = None, *, again: bool = False) -> None:
        self.again = again
        self.parts: dict[str, float] = {}
        """Seconds of every part so far, in order."""
        self._since = time.time() if began is None else began

    def mark(self, part: str, at: float | None = None) -> None:
        """What happened since the mark before was ``part``."""
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
        """``recovery/seconds`` and one figure per part; none for a first start."""
        if not self.again:
            return {}
        figures = {f"recovery/{part.replace(' ', '_')}_seconds": seconds for part, seconds in self.parts.items()}
        return {"recovery/seconds": self.seconds, **figures}


def leave_stamps(stamps: Sequence[tuple[str, float]], again: bool) -> None:
    """Leave in this worker what its group's start took so far: (part, when it ended), the first being the beginning."""
    os.environ[_STAMPS] = json.dumps({"stamps": list(stamps), "again": again})


def from_stamps() -> StartUp:
    """The start-up that ``leave_stamps`` left, to be continued."""
    left = json.loads(os.environ[_STAMPS])
    (_, began), *ended = left["stamps"]
    startup = StartUp(began, again=left["again"])
    for part, at in ended:
        startup.mark(part, at)
    return startup
