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
from pipeline.storage.folders import Folder
from pipeline.tracking.journal import Entry, Journal, weight
from pipeline.tracking.mlflow_run import MLflowRun, first_line, mlflow_client, mlflow_errors
from pipeline.tracking.mlflow_writer import MLflowWriter, is_refused
from pipeline.tracking.report import write_pages
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
        self.run, self.folder = run, folder
        self._page_writer = write_pages
        self.journal = Journal(folder)
        self.uploader = JournalUploader(run, self.journal, registered_model)
        self.journal.append("start")
        self._sampler = SystemSampler(self._log_system) if sample_system else None

    def log_params(self, params: Mapping[str, Any]) -> None:
        values = {name: redact(v) if isinstance(v, str) else v for name, v in params.items()}
        self.journal.append("params", values=values)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.journal.append("tags", values=dict(tags))

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        values = [dataclasses.asdict(item) | {"source": redact(item.source)} for item in inputs]
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
        self.run, self.journal = run, journal
        self.registered_model = registered_model
        self._sent = journal.sent(run.run_id)
        self._failures = 0  # failed attempts since the last success
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
            try:
                if writer is None:
                    client = mlflow_client(self.run.tracking_uri)
                    writer = MLflowWriter(self.run, client, self.journal.folder, self.registered_model)
                self._send_all(writer)
            except mlflow_errors() as error:
                self._failed(error)
            # Not at every period: an object in a bucket is always written as a whole.
            if self._mirror_requested or time.monotonic() - self._mirrored > _MIRROR_SECONDS:
                self._mirror_requested, self._mirrored = False, time.monotonic()
                self.journal.mirror()

    def _send_all(self, writer: MLflowWriter) -> None:
        """Send until nothing is left; raises the client's error where the store does not answer."""
        while self._sent < self.journal.size and not self._stopped:
            batch: list[Entry] = []
            end = self._sent
            for entry, position in self.journal.read(self._sent):
                alone = entry["kind"] != "metrics"
                if batch and (alone or len(batch) == _MOST_ENTRIES):
                    break
                batch.append(entry)
                end = position
                if alone:
                    break
            self._send(writer, batch)
            self._sent = max(end, self._sent)
            if not batch:  # the rest is damaged
                self._sent = self.journal.size
            self.journal.mark_sent(self.run.run_id, self._sent)
            if self._failures:
                logger.info("MLflow at %s answers again", redact(self.run.tracking_uri))
                self._failures = 0

    def _send(self, writer: MLflowWriter, batch: Sequence[Entry]) -> None:
        """Send entries of one kind; an entry that the store refuses is left out with a warning."""
        if not batch:
            return
        try:
            writer.write(batch)
        except mlflow_errors() as error:
            if not is_refused(error):
                raise
            what = json.dumps(batch[0])[:200]
            logger.warning("MLflow refuses an entry (%s), which is left out: %s", first_line(error), what)
        except (UserError, LookupError, ValueError) as error:
            logger.warning("an entry of the journal is left out (%s): %s", error, json.dumps(batch[0])[:200])

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._attempts_failed += 1
        if self._failures == 1:
            logger.warning(
                "MLflow at %s does not answer (%s); the run goes on and keeps its entries in %s",
                redact(self.run.tracking_uri),
                first_line(error),
                self.journal.path,
            )
