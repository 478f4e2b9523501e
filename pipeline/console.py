"""Progress on the console: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.redaction import redact

LOG_SECONDS = 5.0
"""Seconds between two log lines of one piece of work."""

MOST_CHARACTERS = 2000
"""Of a message."""
_MOST_READ = 100_000
_MOST_LINES = 1000

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class PlainFormatter(logging.Formatter):
    """Log lines as ``plain`` makes them; a table has several. A traceback stands as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return "\n".join(map(plain, super().formatMessage(record).split("\n")[:_MOST_LINES]))


def log_plainly() -> None:
    """Let this process log lines of text alone, as ``plain`` makes them, unless it logs somewhere already."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])


def plain(message: str) -> str:
    """A message for a terminal or a log: names and values of foreign files in it give no orders and flood nothing.

    Control characters, invisible ones and line ends are written as escapes, the middle of a long message is left out,
    and addresses lose their secrets (redaction.py).
    """
    text = "".join(map(_visible, redact(message[:_MOST_READ])))
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def python_command() -> str:
    """What to type in this folder for the interpreter that runs now: python where that is it, or else its path."""
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == Path(sys.executable):
        return "python"
    below = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if below.startswith(os.pardir) else below)


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def format_seconds(seconds: float) -> str:
    """2:03 below an hour, 1:02:03 below two days, 18 days above."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.0f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(bytes_per_second: float) -> str:
    """52.0 MB/s, or 310 kB/s below one megabyte; "not measured" where nothing was."""
    if bytes_per_second <= 0:
        return "not measured"
    megabytes = bytes_per_second / 1e6
    return f"{megabytes:,.1f} MB/s" if megabytes >= 1 else f"{max(0.1, megabytes * 1000):,.1f} kB/s"


def with_progress(items: Sequence[Item], title: str, unit: str, *, shown: bool) -> Iterator[Item]:
    """The items one by one; where all together take longer than LOG_SECONDS, it is said how many are done.

    Args:
        title: name of the work, in front of every line.
        unit: what the items are, in the plural.
        shown: whether this process is the one that says it.
    """
    if not shown:
        yield from items
        return
    with CountProgress(title, unit, len(items), only_long=True) as progress:
        for item in items:
            yield item
            progress.add()


class CountProgress:
    """How many units of a known, or later known, total are done.

    Args:
        title: name of the work, in front of the bar and of every log line.
        unit: what is counted, in the plural.
        total: number of units; it may be given to update_to later.
        only_long: say nothing of work that is done within LOG_SECONDS.
    """

    def __init__(self, title: str, unit: str, total: int | None = None, *, only_long: bool = False) -> None:
        from tqdm import tqdm

        self._title, self._unit, self._says_end = title, unit, not only_long
        self._bar = tqdm(
            total=total,
            desc=title,
            unit=f" {unit}",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
            delay=LOG_SECONDS if only_long else 0,
        )
        self._total, self._done = total or 0, 0
        self._logged = time.perf_counter()

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self.update_to(self._done + count, self._total)

    def update_to(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done."""
        self._bar.total = self._total = total
        self._bar.update(done - self._done)
        self._done = done
        now = time.perf_counter()
        if self._bar.disable and (now - self._logged >= LOG_SECONDS or (done == total and self._says_end)):
            self._logged = now
            logger.info("%s: %s of %s %s", self._title, f"{done:,}", f"{total:,}", self._unit)
