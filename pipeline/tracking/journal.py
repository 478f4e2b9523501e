"""The journal of a run: everything it logs, in order, in tracking.jsonl of its folder, one JSON object per line.

The file is the record of the run and the queue of entries for MLflow: tracking_sent.json beside it holds the number of
bytes that a store has received. The operating system has a line when ``append`` returns, so it survives the death of
the process; after ``sync`` it survives a failure of the machine. One process writes at a time. A line that a full disk
or a failure of the machine cut off is dropped. An object in a bucket cannot be appended to: the journal of a run in a
bucket is a file on this node that ``mirror`` copies there, and lines that are lost with a node are logged again when
their steps are repeated.

An entry is a dictionary with ``kind`` and ``time`` (milliseconds since 1970), and what journal_entries.py names for its
kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pipeline.errors import UserError
from pipeline.run_files import JOURNAL_FILE, JOURNAL_SENT_FILE
from pipeline.storage.folders import Folder, LocalFolder, node_cache
from pipeline.storage.json_files import DamagedFileError, WrongJsonError, parse_json, read_json
from pipeline.tracking.journal_entries import AnyEntry, Sent

logger = logging.getLogger(__name__)

_MOST_BYTES = 4 << 20  # of a line
_MOST_HELD = 100_000  # entries kept in memory while the disk accepts none

Entry: TypeAlias = dict[str, Any]


class Journal:
    """The entries of one run.

    Args:
        folder: the run folder; None keeps the entries in a temporary file until the process ends.
    """

    def __init__(self, folder: Folder | None) -> None:
        self.folder = folder
        self.last_step: dict[str, int] = defaultdict(lambda: -1)
        """Metric -> step of its last point, -1 where it has none."""
        self.samples: list[int] = []
        """Steps with a sample."""
        self.checkpoints: dict[int, set[str]] = {}
        """Step of each logged checkpoint -> names of its metrics, and "best" where it was the best."""
        self.rollbacks: list[tuple[int, int]] = []
        """Position behind each rollback, and the step that it went back to."""
        self.start_time: int | None = None
        """Time of the first entry, in milliseconds since 1970."""
        self._settings: dict[str, Any] = {}  # in force
        self._trained: dict[int, tuple[dict[str, Any], float]] = {}  # step -> the settings then, and the learning rate
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self._mirrored = 0
        self._temporary = tempfile.TemporaryDirectory(prefix="gpt25-") if folder is None else None  # removed with it
        self._local = LocalFolder(url=self._temporary.name) if self._temporary else _local_folder(folder)
        self.path = self._local.path / JOURNAL_FILE
        self._file = self.path.open("ab", buffering=0)
        self.size = _cut_to_whole_lines(self.path)
        for entry, position in self.read(0):
            self._count(entry, position)

    def append(self, kind: str, **values: Any) -> None:
        """Add an entry. If the disk accepts nothing, there is a warning, and a later call writes the entry."""
        entry = {"kind": kind, "time": int(time.time() * 1000), **values}
        with self._lock:
            self._held.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._count(entry, self.size + sum(map(len, self._held)))
            self._write()

    def _write(self) -> None:
        block = b"".join(self._held)
        try:
            if self._file.write(block) != len(block):
                raise OSError("the disk is full")
        except OSError as error:
            if len(self._held) == 1:
                logger.warning("%s cannot be written (%s); its lines are kept in memory", self.path, error)
            del self._held[:-_MOST_HELD]
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.size)  # the part of the block that was written
        else:
            self.size += len(block)
            self._held.clear()

    def sync(self) -> None:
        """Return when all entries are on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s cannot be flushed (%s)", self.path, error)

    def mirror(self) -> None:
        """Copy the journal to the run's bucket, if the run is in one and the journal has grown."""
        if self.folder is None or isinstance(self.folder, LocalFolder) or self._mirrored == self.size:
            return
        size = self.size
        try:
            sent = _read_or_empty(self._local, JOURNAL_SENT_FILE)
            self.folder.write(JOURNAL_FILE, [self._local.read_range(JOURNAL_FILE, 0, size)])
            if sent:
                self.folder.write(JOURNAL_SENT_FILE, [sent])
            self._mirrored = size
        except UserError as error:
            logger.warning("%s; the run goes on", error)

    def read(self, start: int) -> Iterator[tuple[Entry, int]]:
        """The entries from byte ``start`` on, each with the position of its end."""
        with self.path.open("rb") as file:
            yield from read_entries(file, start, self.size)

    def sent(self, run_id: str) -> int:
        """Number of bytes that the MLflow run ``run_id`` has received; 0 where another run has received some."""
        return min(_sent_bytes(self._local, run_id), self.size)

    def mark_sent(self, run_id: str, num_bytes: int) -> None:
        """Record how much has been sent. A lost record costs a comparison with the store, not doubled points."""
        content = json.dumps({"run_id": run_id, "num_bytes": num_bytes}).encode()
        try:
            self._local.write(JOURNAL_SENT_FILE, [content], flush="nothing")
        except UserError as error:
            logger.debug("%s", error)

    def close(self) -> None:
        """Copy the journal to the bucket for the last time; no entry may follow."""
        self.mirror()
        self._file.close()

    def changes(
        self, step: int, settings: Mapping[str, Any], learning_rate: Callable[[int], float]
    ) -> dict[str, tuple[Any, Any]]:
        """In which settings the steps after ``step`` that the journal has differ from the ones that will be done.

        Args:
            settings: what decides the numbers of a step, besides its learning rate.
            learning_rate: rate of a step, counted from 0.

        Returns:
            Setting -> its values before and now; nothing where the same steps will be done again.
        """
        found: dict[str, tuple[Any, Any]] = {}
        now = json.loads(json.dumps(dict(settings)))
        for done, (before, rate) in sorted(self._trained.items()):
            if done <= step:
                continue
            for name in now.keys() & before.keys():  # an older version did not know every setting
                if before[name] != now[name]:
                    found.setdefault(name, (before[name], now[name]))
            if (new_rate := learning_rate(done - 1)) != rate and not any(name.startswith("rate of") for name in found):
                found[f"rate of step {done}"] = (rate, new_rate)
        return found

    def _count(self, entry: Entry, position: int) -> None:
        """Bring the attributes up to date; the entry ends at ``position``."""
        self.start_time = self.start_time or entry["time"]
        kind = entry["kind"]
        if kind == "metrics":
            for name in entry["values"]:
                self.last_step[name] = max(self.last_step[name], entry["step"])
            if "train/lr" in entry["values"]:
                self._trained[entry["step"]] = (self._settings, entry["values"]["train/lr"])
        elif kind == "params":
            self._settings = {**self._settings, **json.loads(json.dumps(entry["values"]))}
        elif kind == "inputs":
            prints = {f"{item['context']}_fingerprint": item["fingerprint"] for item in entry["values"]}
            self._settings = {**self._settings, **prints}
        elif kind == "sample":
            self.samples.append(entry["step"])
        elif kind == "checkpoint":
            if entry["best"]:  # there is one at a time
                for names in self.checkpoints.values():
                    names.discard("best")
            known = self.checkpoints.setdefault(entry["step"], set())
            known.update(entry["values"], ["best"] if entry["best"] else [])
        elif kind == "rollback":
            self.rollbacks.append((position, entry["step"]))
            self._forget_after(entry["step"])

    def _forget_after(self, step: int) -> None:
        for name in filter(_has_optimizer_steps, self.last_step):
            self.last_step[name] = min(self.last_step[name], step)
        self.samples = [each for each in self.samples if each <= step]
        self.checkpoints = {each: names for each, names in self.checkpoints.items() if each <= step}
        self._trained = {each: then for each, then in self._trained.items() if each <= step}


def given_up(entry: Entry, step: int) -> Entry | None:
    """What is left of an entry above a rollback to ``step``; None where nothing is."""
    kind = entry["kind"]
    if kind == "metrics":
        values = {n: v for n, v in entry["values"].items() if entry["step"] <= step or not _has_optimizer_steps(n)}
        return {**entry, "values": values} if values else None
    if kind in ("sample", "checkpoint"):
        return entry if entry["step"] <= step else None
    if kind in ("params", "tags", "inputs"):
        return entry if step else None  # from step 0 on it is another run
    return None if kind in ("page", "rollback") else entry


def _has_optimizer_steps(metric: str) -> bool:
    """The figures of the node count seconds instead."""
    return not metric.startswith("system/")


def read_journal(folder: Folder, start: int = 0) -> Iterator[Entry]:
    """The entries of the journal in ``folder`` from byte ``start`` on; none where there is no journal."""
    content = _read_or_empty(folder, JOURNAL_FILE)
    yield from (entry for entry, _ in read_entries(io.BytesIO(content), start, len(content)))


def count_waiting(folder: Folder, run_id: str) -> int:
    """Number of points and other entries in ``folder``'s journal that the MLflow run ``run_id`` has not received."""
    return sum(map(weight, read_journal(folder, _sent_bytes(folder, run_id))))


def weight(entry: Entry) -> int:
    """Number of points in an entry of metrics; 0 for a start and a rollback, 1 for any other entry."""
    if entry["kind"] in ("start", "rollback"):
        return 0
    return len(entry["values"]) if entry["kind"] == "metrics" else 1


def read_entries(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Entry, int]]:
    """The entries in bytes ``[start, stop)``, each with the position of its end; damaged lines are left out."""
    if start >= stop:  # by however much: a foreign record may say so
        return
    file.seek(start)
    position, damaged = start, 0
    while position < stop:
        line = file.readline(_MOST_BYTES)
        position += len(line)
        while len(line) == _MOST_BYTES and not line.endswith(b"\n"):  # so long a line is none of ours
            line = b"{" + file.readline(_MOST_BYTES - 1)
            position += len(line) - 1
        if not line.endswith(b"\n"):
            return
        try:
            entry = parse_json(line, AnyEntry)
        except WrongJsonError as error:
            damaged += 1
            if damaged == 1:
                logger.warning(
                    "the journal's line before byte %d is damaged and left out, and so is each like it (%s)",
                    position,
                    error,
                )
            continue
        yield entry, position


def _local_folder(folder: Folder | None) -> LocalFolder:
    """The folder on this node that holds the journal of ``folder``; a bucket's journal is fetched to it."""
    assert folder is not None
    if isinstance(folder, LocalFolder):
        return folder
    local = LocalFolder(url=str(node_cache("runs") / hashlib.sha256(folder.url.encode()).hexdigest()[:16]))
    local.make()
    in_bucket, here = _read_or_empty(folder, JOURNAL_FILE), _read_or_empty(local, JOURNAL_FILE)
    if not in_bucket or not here.startswith(in_bucket):  # another run's, or another node has continued this one
        local.delete(JOURNAL_SENT_FILE)
        local.write(JOURNAL_FILE, [in_bucket], flush="nothing")
        if sent := _read_or_empty(folder, JOURNAL_SENT_FILE):
            local.write(JOURNAL_SENT_FILE, [sent], flush="nothing")
    return local


def _sent_bytes(folder: Folder, run_id: str) -> int:
    """Number of bytes that the MLflow run has received, by the record in ``folder``; 0 for any other run."""
    try:
        sent = read_json(folder, JOURNAL_SENT_FILE, Sent, mend="the store is asked")
    except DamagedFileError:  # empty, or cut off
        return 0
    return max(0, sent["num_bytes"]) if sent is not None and sent["run_id"] == run_id else 0


def _read_or_empty(folder: Folder, name: str) -> bytes:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return b""


def _cut_to_whole_lines(path: Path) -> int:
    """Drop the part of a line that a dying process or machine left; returns the size afterwards."""
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    if size < len(content):
        os.truncate(path, size)
    return size
