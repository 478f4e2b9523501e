"""What the sections of benchmarks/bpe.py have in common: measuring, medians, tables, targets, the machine.

MB is 10^6 bytes of UTF-8. Seconds are CPU seconds of this process, all of its threads, unless a name says wall.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numba", "numpy", "pyarrow", "gigatoken", "tiktoken", "tokenizers", "rustbpe")


class Seconds(NamedTuple):
    """How long a call took."""

    cpu: float
    wall: float


def measure(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Seconds and result of a call; the garbage of what came before is not counted."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall), result


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return number(self.values[0])
        return f"{number(self.median)} ({number(min(self.values))}-{number(max(self.values))})"


def quotients(above: Iterable[float], below: Iterable[float]) -> Spread:
    """Ratios of measurements that stand beside each other."""
    return Spread.of(one / other for one, other in zip(above, below, strict=True))


def number(value: float) -> str:
    """Three digits at least, no more than tell something."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and the limit it is held to."""

    name: str
    found: float
    limit: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.is_met else "MISSED"
        return f"{verdict:6}  {self.name} {sign} {number(self.limit)}: {number(self.found)}"


Row = Mapping[str, Any]


@dataclass(kw_only=True)
class Section:
    """Tables of one question, what has to be known to read them, and the targets."""

    title: str
    tables: list[tuple[str, list[Row]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["", f"== {self.title}"]
        for caption, rows in self.tables:
            lines += ["", caption, *_table(rows)]
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *map(str, self.targets)] if self.targets else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same figures, every repeat of them."""
        return {
            "title": self.title,
            "tables": [
                {"caption": caption, "rows": [{name: _plain(cell) for name, cell in row.items()} for row in rows]}
                for caption, rows in self.tables
            ],
            "notes": self.notes,
            "targets": [
                {"name": target.name, "found": target.found, "limit": target.limit, "met": target.is_met}
                for target in self.targets
            ],
        }


def _plain(cell: Any) -> Any:
    if not isinstance(cell, Spread):
        return cell
    return {"median": cell.median, "min": min(cell.values), "max": max(cell.values), "values": cell.values}


def _table(rows: list[Row]) -> list[str]:
    """Rows under their headings, the first column to the left, the figures to the right."""
    headings = list(dict.fromkeys(name for row in rows for name in row))
    cells = [headings, *([_shown(row.get(name)) for name in headings] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    lines = []
    for line in cells:
        figures = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  " + "  ".join([line[0].ljust(widths[0]), *figures]).rstrip())
    return [lines[0], "  " + "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    return number(cell) if isinstance(cell, float) else str(cell)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}",
        "software": f"{platform.system()}, Python {platform.python_version()}, {', '.join(versions)}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    wide = "AVX-512" if "avx512bw" in fields.get("flags", "") else "AVX2" if "avx2" in fields.get("flags", "") else ""
    return " ".join(filter(None, [fields.get("model name", platform.machine()), "model", fields.get("model"), wide]))


def _commit() -> str:
    """Of the checkout, with a word on changes that are not in it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown (no git checkout)"
        changed = git("status", "--porcelain", "--", "pipeline", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + (" and changes that are not committed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
