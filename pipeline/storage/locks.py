"""What one process of this machine does at a time; a lock is let go when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, node_cache

_WAIT_SECONDS = 10.0  # for a job that was told to stop

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_one_process(path: Path) -> Iterator[None]:
    """Hold the lock file of a folder that is fetched to, waiting for whoever has it."""
    with path.open("w") as file:
        if not _take(file):
            logger.info("waiting for the process that fetches to %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def only_writer(output: Folder) -> Iterator[None]:
    """Hold an output folder against other jobs, whose unfinished files a job would remove.

    It holds against jobs of this user on this machine, where the drivers of submitted jobs are, too. Raises UserError
    where another one has the folder and does not end in time.
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
        Path(file.name).unlink(missing_ok=True)
        file.close()


def _wait(output: Folder) -> IO[str]:
    place = os.path.realpath(output.path) if isinstance(output, LocalFolder) else str(output)
    path = node_cache("outputs") / f"{hashlib.sha256(place.encode()).hexdigest()[:20]}.lock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + _WAIT_SECONDS
    while (file := _hold(path)) is None:
        job = _holder(path)
        if time.monotonic() > deadline:
            raise UserError(
                f"{job} is writing to {output}; wait until it has ended, or stop it, or choose another --output"
            )
        logger.info("waiting for %s, which is writing to %s, to end", job, output)
        time.sleep(_WAIT_SECONDS / 4)
    return file


def _holder(path: Path) -> str:
    try:
        return f"another job (process {path.read_text()})"
    except FileNotFoundError:
        return "another job"


def _hold(path: Path) -> IO[str] | None:
    """The lock file, held, with this process's number in it; None where another process holds it."""
    while True:
        file = path.open("a")
        if not _take(file):
            file.close()
            return None
        if _has_name(file, path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # its last holder took the name away after we had opened it


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
