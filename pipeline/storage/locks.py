"""Locks between the processes of this machine; a lock ends with its process, however that ends.

The lock of an output folder is written by hand, because filelock does not say which process holds a lock, and because
its file must go when the job has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, node_cache, write_error

_WAIT_SECONDS = 10.0  # for a job that was told to stop
_POLL_SECONDS = 0.02
_TELL_SECONDS = 2.5  # how often a job says what it waits for

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def process_lock(path: Path) -> Iterator[None]:
    """Hold a lock file against the other processes and threads of this machine, waiting for whoever has it.

    Raises UserError where the file cannot be made. The file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, mode=0o666)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            logger.debug("waiting for the process that holds %s", path)
            lock.acquire(poll_interval=_POLL_SECONDS)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def exclusive_output(output: Folder) -> Iterator[None]:
    """Hold an output folder against other jobs, which would remove this job's unfinished files.

    The lock of a folder on a disk, .NAME.lock, lies beside it, where every job sees it that writes there, whatever its
    home, cache or user; that of a bucket, or of a folder beside which nothing can be written, lies in the cache, where
    the jobs of one user on one machine see it. Raises UserError where another job holds the folder and does not end
    within ten seconds.
    """
    try:
        file = _wait(output)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home, as in some containers
        logger.warning("another job may write to %s, too: no lock can be made (%s)", output, error)
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another user's, in a folder like /tmp
            Path(file.name).unlink(missing_ok=True)
        file.close()


def _wait(output: Folder) -> IO[str]:
    path = _lock_path(output)
    start = told = time.monotonic()
    while (file := _try_to_hold(path)) is None:
        job = "another job"
        with contextlib.suppress(OSError, ValueError):
            job = f"another job (process {int(path.read_text())})"
        now = time.monotonic()
        if now - start > _WAIT_SECONDS:
            raise UserError(
                f"{job} is writing to {output}; wait until it has ended, or stop it, or choose another --output"
            )
        if now >= told:
            logger.info("waiting for %s, which is writing to %s, to end", job, output)
            told = now + _TELL_SECONDS
        time.sleep(_POLL_SECONDS)
    return file


def _lock_path(output: Folder) -> Path:
    """Where the lock of an output lies, in a folder that exists."""
    place = os.path.realpath(output.path) if isinstance(output, LocalFolder) else str(output)
    if isinstance(output, LocalFolder) and place != os.sep:
        beside = Path(place).with_name(f".{Path(place).name}.lock")
        with contextlib.suppress(OSError):
            _open_beside(beside)
            return beside
    path = node_cache("outputs") / f"{hashlib.sha256(place.encode()).hexdigest()[:20]}.lock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _open_beside(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _open_lock(path).close()


def _open_lock(path: Path) -> IO[str]:
    """Open a lock file, which is made; one of another user may be readable only, and a link is never followed."""
    more = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return open(path, "r+", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT | more, 0o644))
    except PermissionError:
        return open(path, opener=lambda name, _: os.open(name, os.O_RDONLY | more))


def _try_to_hold(path: Path) -> IO[str] | None:
    """The lock file, held, with the id of this process in it; None where another process holds it."""
    while True:
        file = _open_lock(path)
        if not try_flock(file):
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            status = os.fstat(file.fileno())
            if os.path.samestat(path.lstat(), status):
                if status.st_uid == os.geteuid() and status.st_nlink == 1 and file.writable():
                    file.truncate(0)
                    file.write(str(os.getpid()))
                    file.flush()
                return file
        file.close()  # its last holder removed the file after it was opened here


def try_flock(file: IO[Any]) -> bool:
    """Whether this open file has got the lock of the file itself, which ends when it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
