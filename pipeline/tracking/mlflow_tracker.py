"""MLflow's tracker: it writes to the run's journal (journal.py), and a background thread uploads the journal's entries.

Training never waits for MLflow. While a server does not answer there is one warning, and the entries stay in the
journal. They are uploaded when the server answers again, or by the next process of the run, in order and once: every
entry is sent in such a way that sending it again changes nothing. MLflow merges points of equal key, step, time and
value, and the journal keeps the time. Points of a step that the server has already, from a journal that was lost, are
left out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.redaction import redact
from pipeline.run_files import CURVES_FILE, REPORT_FILE, SCORES_FILE, SUMMARY_FILE
from pipeline.storage.folders import Folder
from pipeline.tracking.journal import Entry, Journal, given_up, weight
from pipeline.tracking.mlflow_run import MLflowRun, current_run, mlflow_client, mlflow_errors, next_run, write_record
from pipeline.tracking.mlflow_writer import MLflowWriter, is_refused
from pipeline.tracking.report import write_pages
from pipeline.tracking.store_errors import first_line, is_deleted, trouble_of
from pipeline.tracking.system_metrics import SystemSampler
from pipeline.tracking.tracker import RunInput, Status, Tracker

logger = logging.getLogger(__name__)

_PERIOD_SECONDS = 5.0
_MIRROR_SECONDS = 60.0
_MOST_PERIOD_SECONDS = 60.0  # between two attempts to reach a server that does not answer
_IDLE_SECONDS = 10.0  # that ``finish`` waits while no entry is uploaded
_MOST_ENTRIES = 200  # of metrics, in one request


class MLflowTracker(Tracker):
    """Logs to one MLflow run, through the run's journal.

    Args:
        run: the MLflow run.
        folder: the run folder, which gets the journal, the curves and the report. None for a job that logs once, at its
            end: the journal is then a temporary file, and entries that cannot be sent are lost with the process.
        registered_model: name to register the best checkpoint under, with the alias "best"; None registers none.
        sample_system: log CPU, memory and GPU figures of this node (system/...) every few seconds.
        write_pages: writes the report of a finished run into its folder, and returns the names of the files.
    """

    def __init__(
        self,
        run: MLflowRun,
        folder: Folder | None = None,
        *,
        registered_model: str | None = None,
        sample_system: bool = False,
        write_pages: Callable[[Folder, Iterable[Entry]], list[str]] = write_pages,
    ) -> None:
        self.folder = folder
        self._page_writer = write_pages
        self.journal = Journal(folder)
        self.uploader = JournalUploader(run, self.journal, registered_model)
        self.journal.append("start")
        self._sampler = SystemSampler(self._log_system) if sample_system else None

    @property
    def run(self) -> MLflowRun:
        """The MLflow run that is written to; a rollback begins another one."""
        return self.uploader.run

    def log_start(self, step: int, settings: Mapping[str, Any], learning_rate: Callable[[int], float]) -> None:
        settings = {name: redact(v) if isinstance(v, str) else v for name, v in settings.items()}
        changed = self.journal.changes(step, settings, learning_rate)
        if not changed:
            return
        shown = ", ".join(f"{name} {now} instead of {before}" for name, (before, now) in changed.items())
        logger.warning(
            "the steps after %d are done again with %s: they are told anew, in a new MLflow run", step, shown
        )
        self.journal.append("rollback", step=step, changed=changed)
        self.flush()
        if self.folder is not None:  # what says how the steps that are given up ended
            for name in (SUMMARY_FILE, SCORES_FILE, REPORT_FILE, CURVES_FILE):
                self.folder.delete(name)

    def log_params(self, params: Mapping[str, Any]) -> None:
        values = {name: redact(v) if isinstance(v, str) else v for name, v in params.items()}
        self.journal.append("params", values=values)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.journal.append("tags", values=dict(tags))

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        values = [dataclasses.asdict(item) | {"source": redact(item.source)} for item in inputs]
        values = [{name: value for name, value in item.items() if value is not None} for item in values]
        self.journal.append("inputs", values=values)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        new = {name: float(value) for name, value in metrics.items() if step > self.journal.last_step[name]}
        if new:
            self.journal.append("metrics", step=step, values=new)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        if step not in self.journal.samples:
            self.journal.append("sample", step=step, prompt=prompt, text=text)

    def log_checkpoint(
        self, step: int, path: Path | Folder, metrics: Mapping[str, float], *, best: bool = False
    ) -> None:
        known = self.journal.checkpoints.get(step)
        if known is None or not known.issuperset(metrics) or (best and "best" not in known):
            values = {name: float(value) for name, value in metrics.items()}
            self.journal.append("checkpoint", step=step, path=str(path), values=values, best=best)

    def log_file(self, path: Path) -> None:
        self.journal.append("file", path=str(path))
        if self.folder is None:  # the file may be a temporary one
            self.uploader.drain()

    def log_page(self, name: str) -> None:
        self.journal.append("page", name=name)

    def flush(self) -> None:
        """Return when everything is on disk or, without a run folder, sent as far as the store accepts it."""
        self.journal.sync()
        self.uploader.wake()
        if self.folder is None:
            self.uploader.drain()

    def finish(self, status: Status) -> None:
        if self._sampler is not None:
            self._sampler.stop()
        if self.folder is not None and status == "FINISHED":
            self._write_pages(self.folder)
        self.journal.append("status", status=status)
        self.journal.sync()
        self.close()

    def close(self) -> None:
        """Send the entries that are left, as far as the store accepts them, and close the journal."""
        left = self.uploader.drain()
        self.uploader.stop()
        self.journal.close()
        if left:
            where = f"; they are in {self.journal.path}, and the next start sends them" if self.folder else ""
            logger.warning("MLflow has not received %d points%s", left, where)

    def _log_system(self, values: Mapping[str, float]) -> None:
        """Log with the seconds since the run began as the step, so that a restart continues the curves after a gap."""
        begin = self.journal.start_time or 0
        self.log_metrics(values, int(time.time() - begin / 1000))

    def _write_pages(self, folder: Folder) -> None:
        try:
            names = self._page_writer(folder, (entry for entry, _ in self.journal.read(0)))
        except (UserError, ValueError, LookupError, TypeError) as error:  # must not fail a finished run
            logger.warning("the report could not be written: %s", error)
            return
        for name in names:
            self.log_page(name)


def send_waiting(run: MLflowRun, folder: Folder, registered_model: str | None = None) -> None:
    """Send the entries that a finished run could not send because its server did not answer."""
    journal = Journal(folder)
    if journal.sent(run.run_id) < journal.size:
        uploader = JournalUploader(run, journal, registered_model)
        if uploader.drain() == 0:
            logger.info("MLflow has received all that was left in %s", journal.path)
        uploader.stop()
    journal.close()


class JournalUploader:
    """A thread that sends a journal's entries to MLflow, beginning with the first that the store does not have."""

    def __init__(self, run: MLflowRun, journal: Journal, registered_model: str | None) -> None:
        self.journal = journal
        self.run = run if journal.folder is None else current_run(journal.folder, run)
        self.registered_model = registered_model
        self._sent = journal.sent(self.run.run_id)
        self._failures = 0  # failed attempts since the last success
        self._trouble = ""  # the last one that was logged
        self._attempts_failed = 0  # failed attempts in all
        self._wake = threading.Event()
        self._stopped = self._mirror_requested = False
        self._mirrored = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Send at once instead of at the end of the period, and update a bucket's copy of the journal."""
        self._mirror_requested = True
        self._wake.set()

    def drain(self) -> int:
        """Wait while entries are being uploaded; returns the number of points and other entries that are left."""
        failed_before, seen, since = self._attempts_failed, self._sent, time.monotonic()
        while self._sent < self.journal.size and self._attempts_failed == failed_before:
            self._wake.set()
            if self._sent != seen:
                seen, since = self._sent, time.monotonic()
            elif time.monotonic() - since > _IDLE_SECONDS:
                break
            time.sleep(0.02)
        return sum(weight(entry) for entry, _ in self.journal.read(self._sent))

    def stop(self) -> None:
        """End the thread, without waiting for a request that it is sending."""
        self._stopped = True
        self._wake.set()

    def _work(self) -> None:
        writer: MLflowWriter | None = None
        while not self._stopped:
            period = min(_MOST_PERIOD_SECONDS, _PERIOD_SECONDS * 2 ** min(self._failures, 5))
            self._wake.wait(period)
            self._wake.clear()
            errors: tuple[type[Exception], ...] = (UserError, *mlflow_errors())  # the folder may be full too
            try:
                while writer is None or self._send_all(writer):
                    client = mlflow_client(self.run.tracking_uri)
                    writer = MLflowWriter(self.run, client, self.journal.folder, self.registered_model)
            except errors as error:
                self._failed(error, writer)
            # Not at every period: an object in a bucket is always written as a whole.
            if self._mirror_requested or time.monotonic() - self._mirrored > _MIRROR_SECONDS:
                self._mirror_requested, self._mirrored = False, time.monotonic()
                self.journal.mirror()

    def _send_all(self, writer: MLflowWriter) -> bool:
        """Send until nothing is left; returns whether the next entries belong to another run of MLflow.

        Raises the client's error where the store does not answer.
        """
        while self._sent < self.journal.size and not self._stopped:
            batch: list[Entry] = []
            end = begin = self._sent
            for entry, position in self.journal.read(self._sent):
                if entry["kind"] == "rollback" and position > self._begin and not batch:
                    self._begin_next_run(writer, entry["step"], position)
                    return True
                alone = entry["kind"] != "metrics"
                if batch and (alone or len(batch) == _MOST_ENTRIES):
                    break
                end = position
                if left := self._of_this_run(entry, position):
                    batch.append(left)
                    if alone:
                        break
            self._send(writer, batch)
            self._sent = max(end, self._sent)
            if end == begin:  # the rest is damaged
                self._sent = self.journal.size
            self.journal.mark_sent(self.run.run_id, self._sent)
            if self._failures:
                logger.info("MLflow at %s answers again", redact(self.run.tracking_uri))
                self._failures, self._trouble = 0, ""
        return False

    @property
    def _rollbacks(self) -> list[tuple[int, int]]:
        """Those that the run of MLflow comes after."""
        return self.journal.rollbacks[: max(0, self.run.rollbacks)]

    @property
    def _begin(self) -> int:
        """Position in the journal up to which this run of MLflow only has what rollbacks have left."""
        return self._rollbacks[-1][0] if self._rollbacks else 0

    def _of_this_run(self, entry: Entry, position: int) -> Entry | None:
        """What is left of an entry after the rollbacks that this run of MLflow comes after."""
        steps = [step for behind, step in self._rollbacks if position <= behind]
        return given_up(entry, min(steps)) if steps else entry

    def _begin_next_run(self, writer: MLflowWriter, step: int, position: int) -> None:
        """Go on with another run of MLflow, and mark the one that has the steps that were given up."""
        run = next_run(writer.client, self.run, step)
        status, time_of_end = "KILLED", None
        for entry, end in self.journal.read(0):
            if end < position and entry["kind"] == "status":
                status, time_of_end = entry["status"], entry["time"]
        writer.give_up_after(step, run.run_id, status, time_of_end)
        assert self.journal.folder is not None
        write_record(self.journal.folder, run)
        logger.info("MLflow: %s goes on after step %d as %s", self.run.run_id, step, run.location)
        self.run, self._sent = run, 0
        self.journal.mark_sent(run.run_id, 0)

    def _send(self, writer: MLflowWriter, batch: Sequence[Entry]) -> None:
        """Send entries of one kind; an entry that the store refuses is left out with a warning."""
        if not batch:
            return
        try:
            writer.write(batch)
        except mlflow_errors() as error:
            if is_deleted(error) or not is_refused(error):
                raise
            what = json.dumps(batch[0])[:200]
            logger.warning("MLflow refuses an entry (%s), which is left out: %s", first_line(error), what)
        except (UserError, LookupError, ValueError) as error:
            logger.warning("an entry of the journal is left out (%s): %s", error, json.dumps(batch[0])[:200])

    def _failed(self, error: Exception, writer: MLflowWriter | None) -> None:
        self._failures += 1
        deleted = writer.deleted_experiment() if writer is not None and is_deleted(error) else None
        trouble = trouble_of(error, self.run.tracking_uri, deleted)
        if trouble.what != self._trouble:
            self._trouble = trouble.what
            logger.warning("%s; the run goes on and keeps its entries in %s", trouble, self.journal.path)
        self._attempts_failed += 1  # last: whoever waits in ``drain`` has been told
