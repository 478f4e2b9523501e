"""A job that gets a signal at a chosen moment: when it imports a package, starts a process, writes a file, or prints.

The moments are found by a run that is not disturbed, so they are those of its phases, whatever the machine is doing.
A module that Python imports at its start (sitecustomize) notes them, or sends the signal from inside the job.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.fixtures import ROOT
from tests.support.ray_environment import own_environment

HANG_SECONDS = 900
_SITE = """
import os, sys, threading

def watch():
    script = next((part for part in sys.orig_argv if part.endswith(".py")), "")
    if os.path.dirname(script) != os.environ.get("KILLED_JOBS") or os.environ.get("KILLED_PID"):
        return
    os.environ["KILLED_PID"] = str(os.getpid())  # its children inherit it and are left alone
    seen, wanted, counts = set(), os.environ.get("KILLED_AT"), {}
    output = os.environ["KILLED_OUTPUT"]
    notes = os.open(os.environ["KILLED_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event, arguments):
        if event == "import":
            name = "import " + arguments[0].partition(".")[0]
        elif event == "subprocess.Popen":
            counts["process"] = counts.get("process", 0) + 1
            name = f"process {counts['process']}"
        elif event == "os.rename" and str(arguments[1]).startswith(output):
            name = "write " + os.path.basename(str(arguments[1]))
        else:
            return
        if name in seen or threading.current_thread() is not threading.main_thread():
            return
        seen.add(name)
        os.write(notes, f"{name}\\n".encode())
        if name == wanted:
            os.write(notes, b"* told\\n")
            number = int(os.environ["KILLED_BY"])
            os.killpg(0, number) if os.environ.get("KILLED_GROUP") else os.kill(os.getpid(), number)

    sys.addaudithook(hook)

watch()
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended."""

    code: int
    output: str
    was_told: bool
    """Whether the signal was sent before the job had ended by itself."""
    seconds: float
    """From the signal to the end of the process."""


@dataclass(kw_only=True)
class KillableJob:
    """One command, which may be started again and again."""

    name: str
    flags: list[str]
    home: Path
    output: Path
    """What it writes; moments are the files that appear there."""
    environment: dict[str, str] = field(default_factory=dict)

    def moments(self, count: int) -> list[str]:
        """``count`` moments of a run that nobody disturbs, in order; half of them no imports, if it has so many."""
        ended = self.run()
        assert ended.code == 0, ended.output[-5000:]
        found = self.noted()
        assert len(found) >= count, found
        imports = [name for name in found if name.startswith("import ")]
        others = [name for name in found if not name.startswith("import ")]
        num_others = min(len(others), count // 2)
        return sorted([*_spread(imports, count - num_others), *_spread(others, num_others)], key=found.index)

    def noted(self) -> list[str]:
        """The moments of the last run, without those of Python's own start."""
        found = (self.home / "moments").read_text().splitlines()
        return found[found.index("import yaml") :]

    def run(
        self,
        number: signal.Signals | None = None,
        *,
        moment: str = "",
        printed: str = "",
        child: str = "",
        appeared: str = "",
        group: bool = False,
    ) -> Ended:
        """Run the command; it gets the signal ``number`` at a moment of ``moments``, or as it prints a line.

        Args:
            printed: a pattern that the output must match.
            child: part of the command line of a process that it or Ray has started.
            appeared: a pattern of files in its output, of which one must be there.
            group: whether its whole process group gets the signal.
        """
        notes = self.home / "moments"
        notes.unlink(missing_ok=True)
        site = self.home / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_SITE)
        told = {"KILLED_JOBS": str(ROOT / "jobs"), "KILLED_NOTES": str(notes), "KILLED_OUTPUT": str(self.output)}
        if number is not None and moment:
            told |= {"KILLED_AT": moment, "KILLED_BY": str(int(number)), "KILLED_GROUP": "1" if group else ""}
        environment = own_environment() | self.environment | told | {"PYTHONPATH": str(site)}
        log = self.home / f"{self.name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / self.name), *self.flags],
                cwd=self.home,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._watch(process, notes, log, number, printed=printed, child=child, appeared=appeared, group=group)

    def _watch(
        self,
        process: subprocess.Popen[bytes],
        notes: Path,
        log: Path,
        number: signal.Signals | None,
        *,
        printed: str,
        child: str,
        appeared: str,
        group: bool,
    ) -> Ended:
        sent_at, began = 0.0, time.monotonic()
        while process.poll() is None:
            text = log.read_text(errors="replace")
            is_due = bool(printed and re.search(printed, text)) or bool(child and _has_child(process.pid, child))
            is_due = is_due or bool(appeared and any(self.output.glob(appeared)))
            if not sent_at and number is not None and is_due:
                (os.killpg if group else os.kill)(process.pid, number)
                sent_at = time.monotonic()
            if not sent_at and notes.exists() and notes.read_text().endswith("* told\n"):
                sent_at = time.monotonic()
            if time.monotonic() - (sent_at or began) > HANG_SECONDS:
                process.kill()
                raise AssertionError(f"{self.name} hangs\n{log.read_text(errors='replace')[-5000:]}")
            time.sleep(0.02)
        now = time.monotonic()
        was_told = bool(sent_at) or (notes.exists() and "* told\n" in notes.read_text())
        return Ended(
            code=process.wait(),
            output=log.read_text(errors="replace"),
            was_told=was_told,
            seconds=now - sent_at if sent_at else 0.0,
        )


def _has_child(pid: int, words: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if words in " ".join(process.cmdline()):
                    return True
    return False


def _spread(names: list[str], count: int) -> list[str]:
    """``count`` of the names, from the first to the last."""
    return [names[position * (len(names) - 1) // max(1, count - 1)] for position in range(count)]
