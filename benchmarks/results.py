"""Results that are written down as soon as they are known: what comes after them may fail, hang or be cut off."""

from __future__ import annotations

import argparse
import contextlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Results:
    """One JSON object a line, appended to a file; without a file they are only printed by whoever found them.

    Args:
        path: JSON Lines file, made where it is missing.
        label: goes into every line as "part", because several benchmarks may write into one file.
    """

    def __init__(self, path: Path | None, label: str = "") -> None:
        self.path = path
        self.label = label
        self.failures: list[str] = []
        """What failed inside ``attempt``."""

    def add(self, kind: str, **values: Any) -> None:
        """Writes one line; ``kind`` says what it is, its key is "result"."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"part": self.label, "result": kind, **values}) + "\n")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is printed and written down, and does not end the benchmark."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # any failure costs this result alone; the exit code tells of it
            print(f"FAILED  {what}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-8)
            self.failures.append(what)
            self.add("failure", what=what, error=f"{type(error).__name__}: {error}"[:1000])


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """--jsonl and --label, which every benchmark of benchmarks/gpu.py takes."""
    parser.add_argument("--jsonl", type=Path, help="append every result to this file, a JSON line each, at once")
    parser.add_argument("--label", default="", help="written into every line as its part")


def read_results(path: Path) -> list[dict[str, Any]]:
    """All lines of such a file; one that was cut off is left out, and a missing file has none."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
