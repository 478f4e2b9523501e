"""Log files of a run: what each of its processes logs stays in the run folder, also where that lies in a bucket.

A line has its time, its level and its message as ``console.plain`` makes it: no colours, no prefixes of Ray. A file of
MOST_BYTES becomes NAME.log.1, and the one before it NAME.log.2; older lines go. A process that starts again writes on
in its file. Logging never stops a run: what cannot be written is left out, with one warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipeline.console import PlainFormatter, log_plainly
from pipeline.errors import RunStopped, UserError
from pipeline.redaction import redact
from pipeline.storage.folders import Folder, LocalFolder

MOST_BYTES = 8 << 20
"""Of one file. A bucket takes no further lines of a file: the whole is sent again."""
OLDER_FILES = 2
UPLOAD_SECONDS = 60.0
"""Between two uploads of a file that has grown."""
_FOLLOW_SECONDS = 1.0
_END_SECONDS = 10.0  # that a process waits at its end for a bucket

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_MARKS_OF_RAY = (":job_id:", ":actor_name:", ":task_name:")  # begin lines that say whose output a file has

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def keep_log(folder: Folder, name: str, *, with_output: bool = False) -> Iterator[None]:
    """A context in which what this process logs is also written to ``<folder>/<name>.log``, and how the context ended.

    Args:
        with_output: write also what reaches standard output and standard error past Python's logging, such as the lines
            of NCCL; only where these are files, as in Ray's workers.
    """
    log_plainly()  # does nothing where a handler is there already, so it comes first
    try:
        log = LogFile(folder, name, with_output=with_output)
    except (OSError, UserError) as error:
        logger.warning("no log is kept in %s: %s", folder, error)
        yield
        return
    handlers = logging.getLogger().handlers
    handlers.insert(0, log)  # it knows a line before the console shows it
    try:
        log.write("INFO", f"began: process {os.getpid()} on {socket.gethostname()}")
        yield
    except UserError as error:
        log.write("ERROR", str(error))
        raise
    except RunStopped as stopped:
        log.write("INFO", str(stopped))
        raise
    except BaseException as error:
        log.write("ERROR", f"ended by {type(error).__name__}", error)
        raise
    else:
        log.write("INFO", "ended")
    finally:
        handlers.remove(log)
        log.close()


class LogFile(logging.Handler):
    """A handler that writes one file, and a thread that uploads it and follows the process's own output.

    Raises:
        OSError, UserError: the file cannot be opened.
    """

    def __init__(self, folder: Folder, name: str, *, with_output: bool = False) -> None:
        super().__init__()
        self.setFormatter(_LineFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
        self._folder, self._name = folder, f"{name}.log"
        self._temporary = None if isinstance(folder, LocalFolder) else tempfile.TemporaryDirectory(prefix="gpt25-log-")
        self._path = Path(self._temporary.name if self._temporary else str(folder)) / self._name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._temporary:
            _fetch(folder, self._path)
        self._file = self._path.open("ab")
        self._uploaded = self._file.tell()
        self._has_rotated = self._has_failed = False
        self._shown: deque[str] = deque(maxlen=1000)  # what the console's handler adds to the output that is followed
        self._outputs = [_Output(1, "STDOUT"), _Output(2, "STDERR")] if with_output else []
        self._writing = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"log {name}", daemon=True)
        self._thread.start()

    def write(self, level: str, message: str, error: BaseException | None = None) -> None:
        """Write a line to this file alone, and the traceback of ``error`` after it."""
        trace = (type(error), error, error.__traceback__) if error else None
        record = logging.LogRecord(__name__, logging.INFO, "", 0, message, None, trace)
        record.levelname = level
        self._append(record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._outputs:
            self._shown.extend(PlainFormatter("%(message)s").format(record).split("\n"))
        self._append(record)

    def close(self) -> None:
        """Write and upload the rest."""
        self._ended.set()
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s/%s lacks its last lines: the bucket does not answer", self._folder, self._name)
        else:
            try:
                self._file.close()
            except OSError as error:  # a full disk: the lines that are left go with it
                self._warn(error)
        if self._temporary:
            self._temporary.cleanup()
        super().close()

    def _append(self, record: logging.LogRecord) -> None:
        try:
            with self._writing:
                self._file.write(self.format(record).encode("utf-8", "backslashreplace") + b"\n")
                self._file.flush()
                if self._file.tell() >= MOST_BYTES:
                    self._rotate()
        except OSError as error:
            self._warn(error)
        except Exception:  # noqa: BLE001  # as in every handler: a faulty call of a logger is shown and ends nothing
            self.handleError(record)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(OLDER_FILES, 0, -1):
            newer = _older(self._path, number - 1)
            if newer.exists():
                newer.replace(_older(self._path, number))
        self._file = self._path.open("ab")
        self._has_rotated = True

    def _work(self) -> None:
        due = time.monotonic() + UPLOAD_SECONDS
        while not self._ended.wait(_FOLLOW_SECONDS):
            self._follow()
            if time.monotonic() >= due:
                self._upload()
                due = time.monotonic() + UPLOAD_SECONDS
        self._follow()
        self._upload()

    def _follow(self) -> None:
        for output in self._outputs:
            for line in output.new_lines():
                if line in self._shown:
                    self._shown.remove(line)
                elif line.strip() and not line.startswith(_MARKS_OF_RAY):
                    self.write(output.level, line)

    def _upload(self) -> None:
        if self._temporary is None:
            return
        has_rotated = self._has_rotated
        try:
            with self._writing:
                written = self._file.tell()
                if written == self._uploaded and not has_rotated:
                    return
                paths = [_older(self._path, number) for number in range(OLDER_FILES + 1 if has_rotated else 1)]
                contents = {path.name: path.read_bytes() for path in paths if path.exists()}
                self._has_rotated = self._has_rotated and not has_rotated
            for name, content in contents.items():
                self._folder.write(name, [content])
            self._uploaded = written
        except (OSError, UserError) as error:
            self._has_rotated = self._has_rotated or has_rotated
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("lines are missing in %s/%s: %s", self._folder, self._name, error)


class _LineFormatter(PlainFormatter):
    """Lines without colours; a traceback, too, without the secrets of addresses."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = _COLOUR.sub("", record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        return _COLOUR.sub("", redact(super().formatException(ei)))  # type: ignore[arg-type]  # as logging calls it


class _Output:
    """The lines that reach the file behind a descriptor of this process; none where that is no file."""

    def __init__(self, descriptor: int, level: str) -> None:
        self.level = level
        self._path: Path | None = None
        self._read, self._rest = 0, b""
        with contextlib.suppress(OSError):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._path = path if path.is_file() else None

    def new_lines(self) -> list[str]:
        """The whole lines since the last call."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read(MOST_BYTES)
        except OSError:  # Ray has removed it
            return []
        self._read += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def _older(path: Path, number: int) -> Path:
    """The file that was put aside ``number`` times; 0 is the one that is written."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _fetch(folder: Folder, path: Path) -> None:
    """Take what an earlier process has written to the bucket, so that the next upload has it, too."""
    for number in range(OLDER_FILES):
        older = _older(path, number)
        if size := folder.size(older.name):
            older.write_bytes(folder.read_range(older.name, max(0, size - MOST_BYTES), size))
