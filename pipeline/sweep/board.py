"""The state of all trials while the sweep runs: kept on disk, shown on the terminal, logged to MLflow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.storage.folders import Folder
from pipeline.sweep.report import write_pages
from pipeline.sweep.results import TABLE_FILE, Result, best_of, table, write_results
from pipeline.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 60.0  # between two reports while no trial begins or ends


class Board:
    """What is known of every trial; every change of a status is on disk when the method returns.

    Args:
        output: the folder of the sweep.
        results: the state of every trial, which the board changes.
        shared: the settings that all trials have in common, for the report.
        tracker: the sweep's own run in MLflow.
    """

    def __init__(self, output: Folder, results: Sequence[Result], shared: Mapping[str, Any], tracker: Tracker) -> None:
        self.output, self.results, self.shared, self.tracker = output, results, shared, tracker
        self._by_name = {result.name: result for result in results}
        self._ended_early: set[str] = set()
        self._refreshed = time.monotonic()
        self._lock = threading.Lock()

    @property
    def running(self) -> list[str]:
        """Names of the trials that train now."""
        return [result.name for result in self.results if result.status == "running"]

    def begin(self, name: str) -> None:
        """A trial has begun, or begun again."""
        result = self._by_name[name]
        result.status, result.error = "running", ""
        self.save(is_new=True)

    def report(self, name: str, step: int, val_loss: float | None) -> None:
        """A trial has done ``step`` steps, and has a val loss if it was validated."""
        result = self._by_name[name]
        result.take(step, val_loss)
        if val_loss is not None:
            logger.info("%s: step %s, val loss %.4f", _label(result), f"{step:,}", val_loss)
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self.save(is_new=False)

    def end_early(self, name: str) -> None:
        """A rule has asked a trial to end."""
        self._ended_early.add(name)
        logger.info("%s: stopped early by its val loss", _label(self._by_name[name]))

    def finish(self, name: str) -> None:
        """A trial has done all its steps."""
        self._by_name[name].status = "finished"
        self.save(is_new=True)

    def stop(self, name: str) -> None:
        """A trial has ended before its last step, because it was asked to."""
        self._by_name[name].status = "stopped early" if name in self._ended_early else "interrupted"
        self.save(is_new=True)

    def fail(self, name: str, error: str) -> None:
        """A trial cannot go on; the others do."""
        result = self._by_name[name]
        result.status, result.error = "failed", error
        logger.warning("%s failed: %s", _label(result), error)
        self.save(is_new=True)

    def save(self, *, is_new: bool) -> None:
        """Write the files of the sweep, send them to MLflow, and show the table.

        Args:
            is_new: a status has changed.
        """
        with self._lock:
            self._refreshed = time.monotonic()
            write_results(self.output, self.results)
            if is_new:
                logger.info("\n%s", "\n".join(table(self.results)))
            for page in self.write_pages():
                self.tracker.log_page(page)
            best = best_of(self.results)
            if best is not None and best.val_loss is not None:
                self.tracker.log_tags({"best_trial": best.name})
                ended = sum(result.has_ended for result in self.results)
                self.tracker.log_metrics({"sweep/best_val_loss": best.val_loss}, ended)

    def write_pages(self) -> list[str]:
        """Write the report of the sweep; returns the names of the files for MLflow."""
        return [*write_pages(self.output, self.results, self.shared), TABLE_FILE]


def _label(result: Result) -> str:
    return f"{result.name} ({', '.join(f'{name} {value}' for name, value in result.varied.items())})"
