"""Everything that a run tells, in order, in a file of its folder: tracking.jsonl, one JSON object a line.

The file is the run's own memory and the queue of what MLflow has not got yet: tracking_sent.json beside it says up to
which byte a store has it. A line is in the operating system's hands when ``append`` returns, so it outlasts a killed
process; after ``sync`` it outlasts the machine. One process writes at a time. A line that was cut off by a full disk
or by a failure of the machine is dropped. Where the run's folder is in a bucket, which cannot be appended to, the file
lies on this node and is copied to the bucket by ``mirror``; what a lost node took with it is told again by the steps
that are done again.

An entry is a dictionary with ``kind`` and ``time`` (milliseconds since 1970) and, by kind:

    start        a process begins to write
    params tags  values
    inputs       values: tracking.RunInput's fields
    metrics      step, values
    sample       step, prompt, text
    checkpoint   step, path, values, best
    file         path: of this node
    page         name: a file of the run's folder
    status       status
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pipeline.errors import UserError
from pipeline.run_files import JOURNAL_FILE, JOURNAL_SENT_FILE
from pipeline.storage.folders import Folder, LocalFolder, node_cache

logger = logging.getLogger(__name__)

_MOST_HELD = 100_000  # entries in memory while the disk takes none

Entry: TypeAlias = dict[str, Any]


class Journal:
    """The entries of one run.

    Args:
        folder: the run's; None keeps the entries in a temporary file, for as long as the process lives.
    """

    def __init__(self, folder: Folder | None) -> None:
        self.folder = folder
        self.last_step: dict[str, int] = defaultdict(lambda: -1)
        """Of each metric, the step of its last point."""
        self.samples: list[int] = []
        """Steps that had one."""
        self.checkpoints: dict[int, set[str]] = {}
        """Of each checkpoint that was told of, by step, what is known: names of its metrics, and "best"."""
        self.start_time: int | None = None
        """Of the first entry, milliseconds since 1970."""
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self._mirrored = 0
        self._temporary = tempfile.TemporaryDirectory(prefix="gpt25-") if folder is None else None
        self.place = Path(self._temporary.name) if self._temporary else _place_of(folder)
        self.path = self.place / JOURNAL_FILE
        self._file = self.path.open("ab", buffering=0)
        self.size = _cut_to_whole_lines(self.path)
        for entry, _ in self.read(0):
            self._learn(entry)

    def append(self, kind: str, **values: Any) -> None:
        """Add an entry. A disk that takes nothing costs a warning: the entry is held, and written with a later one."""
        entry = {"kind": kind, "time": int(time.time() * 1000), **values}
        with self._lock:
            self._learn(entry)
            self._held.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._write()

    def _write(self) -> None:
        block = b"".join(self._held)
        try:
            if self._file.write(block) != len(block):
                raise OSError("the disk is full")
        except OSError as error:
            if len(self._held) == 1:
                logger.warning("%s cannot be written (%s); its lines wait in memory", self.path, error)
            del self._held[:-_MOST_HELD]
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.size)  # what was written of the block
        else:
            self.size += len(block)
            self._held.clear()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s cannot be flushed (%s)", self.path, error)

    def mirror(self) -> None:
        """Copy what is new to the run's bucket, where it is in one."""
        if self.folder is None or isinstance(self.folder, LocalFolder) or self._mirrored == self.size:
            return
        size, sent = self.size, _read_or_none(self.place / JOURNAL_SENT_FILE)
        try:
            with self.path.open("rb") as file:
                self.folder.write(JOURNAL_FILE, [file.read(size)])
            if sent is not None:
                self.folder.write(JOURNAL_SENT_FILE, [sent])
            self._mirrored = size
        except UserError as error:
            logger.warning("%s; the run goes on", error)

    def read(self, start: int) -> Iterator[tuple[Entry, int]]:
        """Entries from byte ``start`` on, each with the byte that it ends before."""
        with self.path.open("rb") as file:
            yield from read_entries(file, start, self.size)

    def sent(self, run_id: str) -> int:
        """Bytes that the MLflow run ``run_id`` has; 0 for a run that has nothing of this journal yet."""
        return min(_sent_bytes(_read_or_none(self.place / JOURNAL_SENT_FILE), run_id), self.size)

    def note_sent(self, run_id: str, num_bytes: int) -> None:
        """Whole or not at all; a note that is lost costs a comparison with the store, not doubled points."""
        temporary = self.place / f".tmp-{JOURNAL_SENT_FILE}"
        try:
            temporary.write_text(json.dumps({"run_id": run_id, "num_bytes": num_bytes}), encoding="utf-8")
            temporary.replace(self.place / JOURNAL_SENT_FILE)
        except OSError as error:
            logger.debug("%s cannot be written (%s)", self.place / JOURNAL_SENT_FILE, error)

    def close(self) -> None:
        """Nothing more is added."""
        self.mirror()
        self._file.close()

    def _learn(self, entry: Entry) -> None:
        self.start_time = self.start_time or entry["time"]
        if entry["kind"] == "metrics":
            for name in entry["values"]:
                self.last_step[name] = max(self.last_step[name], entry["step"])
        elif entry["kind"] == "sample":
            self.samples.append(entry["step"])
        elif entry["kind"] == "checkpoint":
            known = self.checkpoints.setdefault(entry["step"], set())
            known.update(entry["values"], ["best"] if entry["best"] else [])


def count_waiting(folder: Folder, run_id: str) -> int:
    """Points and other entries of the journal in ``folder`` that the MLflow run ``run_id`` has not got."""
    try:
        content = folder.read(JOURNAL_FILE)
    except FileNotFoundError:
        return 0
    try:
        sent = _sent_bytes(folder.read(JOURNAL_SENT_FILE), run_id)
    except FileNotFoundError:
        sent = 0
    return sum(weight(entry) for entry, _ in read_entries(io.BytesIO(content), sent, len(content)))


def weight(entry: Entry) -> int:
    """Points of an entry of metrics; any other entry counts as one, a start as none."""
    if entry["kind"] == "start":
        return 0
    return len(entry["values"]) if entry["kind"] == "metrics" else 1


def read_entries(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Entry, int]]:
    """Entries of bytes ``[start, stop)``, each with the byte that it ends before; what is no entry is left out."""
    file.seek(start)
    position = start
    while position < stop:
        line = file.readline()
        position += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            entry = json.loads(line)
        except ValueError:
            logger.warning("the journal's line before byte %d is damaged and left out", position)
            continue
        yield entry, position


def _place_of(folder: Folder | None) -> Path:
    """Where on this node the journal of ``folder`` lies; for a bucket, what is there already is fetched."""
    assert folder is not None
    if isinstance(folder, LocalFolder):
        return folder.path
    place = node_cache("runs") / hashlib.sha256(folder.url.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    try:
        there = folder.read(JOURNAL_FILE)
    except FileNotFoundError:
        there = b""
    here = _read_or_none(place / JOURNAL_FILE) or b""
    if not there or not here.startswith(there):  # another run's, or another node went on with this one
        (place / JOURNAL_FILE).write_bytes(there)
        (place / JOURNAL_SENT_FILE).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (place / JOURNAL_SENT_FILE).write_bytes(folder.read(JOURNAL_SENT_FILE))
    return place


def _sent_bytes(note: bytes | None, run_id: str) -> int:
    try:
        noted = json.loads(note or b"{}")
    except ValueError:
        return 0
    return int(noted["num_bytes"]) if noted.get("run_id") == run_id else 0


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _cut_to_whole_lines(path: Path) -> int:
    """Drop what a dying process or machine left of a line; returns the size afterwards."""
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    if size < len(content):
        os.truncate(path, size)
    return size
