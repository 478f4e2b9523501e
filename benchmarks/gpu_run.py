"""One process of benchmarks/gpu.py: stopped at its time limit, what it prints shown and written at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.results import Results

ROOT = Path(__file__).resolve().parents[1]


_OUTPUT_SECONDS = 20
"""For the last lines, after the end. torch's compile workers are a session of their own, may hold the pipe open, and
end when they see that their parent has gone."""


class Log:
    """Everything said goes to standard output and to a file, which grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        """One line, without its end."""
        for file in (None, self._file):
            with contextlib.suppress(ValueError):  # closed: a line that came later than anybody waited for
                print(line, file=file, flush=True)


@dataclass(frozen=True)
class Process:
    """What is to run, and for how long at most."""

    command: list[str]
    limit_seconds: float
    environment: dict[str, str]


def run_part(part: Process, results: Results, log: Log) -> bool:
    """Runs it to its end or its limit; what came of it is said and written. True if it ended with 0.

    Args:
        results: labelled with the part's name.
    """
    label = results.label
    if part.limit_seconds <= 0:
        log.write(f"== {label}: left out, no time is left")
        results.add("end", status="left out", seconds=0)
        return False
    log.write(f"== {label}, {part.limit_seconds:.0f} s at most: {' '.join(part.command)}")
    results.add("start", command=part.command, limit_seconds=part.limit_seconds)
    start = time.perf_counter()
    status = _run(part, log)
    seconds = time.perf_counter() - start
    log.write(f"== {label}: {status} after {seconds:.0f} s")
    results.add("end", status=status, seconds=seconds)
    return status == "done"


def _run(part: Process, log: Log) -> str:
    # A group of its own, so that what it starts ends with it; not a session, which would outlive this one.
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(part.command, cwd=ROOT, env=part.environment, process_group=0, **pipes)
    printing = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    printing.start()
    try:
        code = process.wait(part.limit_seconds)
        return "done" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        return "stopped at its time limit"
    finally:
        _stop(process)
        process.wait()
        printing.join(_OUTPUT_SECONDS)


def _stop(process: subprocess.Popen[Any]) -> None:
    """Ends whatever of the group still runs, so that the next part has the device for itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _copy(lines: IO[str] | None, log: Log) -> None:
    for line in lines or ():
        log.write(line.rstrip("\n"))
