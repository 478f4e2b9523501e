"""Seconds that a start takes, or a new start after a loss, part by part until the first step is done.

The parts of a group of workers under Ray, in order: "shutdown" of the group before it (only after a loss or a resize),
"processes" (Ray starts them), "imports", "process group". Then the parts of the trainer, with or without Ray: "data",
"model", "checkpoint", "first step", which includes compiling.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field

_MARKS = "GPT25_STARTUP"


@dataclass
class StartupTimer:
    """Measures the parts of a start; each mark ends one."""

    since: float = field(default_factory=time.time)
    """The time.time() of the last mark; at first when the loss was noticed or the program began."""
    again: bool = False
    """Whether this replaces a group that was lost or is resized."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of every part so far, in order."""

    def mark(self, part: str) -> None:
        """End ``part``, which began at the mark before."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.since
        self.since = now

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

    def export(self) -> None:
        """Set in this worker's environment how long the start of its group has taken."""
        os.environ[_MARKS] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> StartupTimer:
        """The timer of this worker's group, which ``export`` has left in the environment."""
        return cls(**json.loads(os.environ[_MARKS]))
