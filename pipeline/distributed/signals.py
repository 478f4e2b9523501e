"""Ending a run early: after a signal, through Ray's job control, or because a node is about to be preempted.

The driver gets the signal, but the workers may run on other machines. So the driver writes a stop file into the run's
folder, rank 0 looks for it, and all ranks learn of it at the end of a step (training/step_guard.py). Under torchrun the
workers get the signal themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from pipeline import exit_signals
from pipeline.distributed.watchdog import EXIT_CODE
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

_GIVE_UP_SECONDS = 0.25
_STOP_FILE_SECONDS = 0.5
_ERROR_FILE_SECONDS = 5.0  # every worker looks, perhaps into a bucket
_GRACE_SECONDS = 10.0

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Interruptions:
    """The conditions under which a run ends early, as one rank sees them."""

    stop_requested: Callable[[], bool] = lambda: False
    """Whether this process is to end the run. Called at every step, so it has to be cheap."""
    preemption_pending: Callable[[], bool] | None = None
    """Whether a node of the run is about to be preempted. Collective; all ranks call it every few seconds."""


class StopRequest:
    """Whether a signal has asked this process to end its run, and which one; for use from any thread."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.since = 0.0
        """Time of the signal, as of time.monotonic()."""

    def __call__(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_on_signals(on_request: Callable[[], object] = lambda: None) -> Iterator[StopRequest]:
    """A context in which SIGTERM and Ctrl-C request the end of the run; a second signal ends the process at once.

    A second one within a second is the first one again, as `timeout` sends it. Signals reach the main thread only; in
    another thread the request is never made.

    Args:
        on_request: called once, by the main thread, at the first signal.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request():
            if time.monotonic() - request.since > exit_signals.SAME_SECONDS:
                exit_signals.end(number, "ended at once; the same command goes on from the newest checkpoint")
            return
        request.signal_number, request.since = number, time.monotonic()
        logger.warning(
            "%s: the run ends as soon as what it has done is saved; again to end it at once",
            signal.Signals(number).name,
        )
        try:
            on_request()
        except UserError as error:
            logger.warning("the workers cannot be told: %s", error)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with exit_signals.suspended():
        before = {number: signal.signal(number, handle) for number in exit_signals.NUMBERS}
        try:
            yield request
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class GivenUp(Exception):  # noqa: N818  # nothing went wrong
    """Nobody waits any more for what a thread does."""


def call_in_thread(action: Callable[[], Result], give_up: Callable[[], bool] = lambda: False) -> Result:
    """``action()`` in a thread, so that it cannot replace the signal handlers of the main thread.

    Args:
        give_up: whether to wait no longer; asked a few times a second. The thread goes on until the process ends.

    Raises:
        GivenUp: ``give_up`` said so.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            future.set_exception(error)

    threading.Thread(target=work, name="interruptible", daemon=True).start()
    while not future.done():
        wait([future], timeout=_GIVE_UP_SECONDS)
        if not future.done() and give_up():
            raise GivenUp
    return future.result()


class FileWatcher:
    """A thread that looks for a file, as a request to a bucket would take too long for a step.

    Args:
        exists: whether the file is there; if the storage does not answer, it is called again.
        seconds: time between two calls.
        on_found: called once in the thread, with the event that close() sets.
    """

    def __init__(
        self,
        exists: Callable[[], bool],
        *,
        seconds: float = _STOP_FILE_SECONDS,
        on_found: Callable[[threading.Event], object] = lambda closed: None,
    ) -> None:
        self._exists, self._seconds, self._on_found = exists, seconds, on_found
        self._found = False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="file-watcher", daemon=True).start()

    def __call__(self) -> bool:
        """Whether the file was there once."""
        return self._found

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._found and not self._closed.wait(self._seconds):
            with contextlib.suppress(UserError, OSError):
                self._found = self._exists()
        if self._found:
            self._on_found(self._closed)


def end_after_peer_error(
    exists: Callable[[], bool],
    before_exit: Callable[[], object],
    exit_process: Callable[[], None] = lambda: os._exit(EXIT_CODE),
) -> contextlib.AbstractContextManager[object]:
    """A context that ends this process if another worker has left with an error and this one waits for it for ever.

    Over gloo a collective fails as soon as a process leaves; over NCCL it may go on waiting. A thread looks for the
    error file of the other worker, and then allows some seconds for an orderly end.

    Args:
        exists: whether the error file is there.
        before_exit: called before the process ends.
        exit_process: called at the end; tests replace it.
    """

    def end(closed: threading.Event) -> None:
        if not closed.wait(_GRACE_SECONDS):
            logger.error("another worker has left with an error, and this one waits for it: it ends too")
            before_exit()
            exit_process()

    return contextlib.closing(FileWatcher(exists, seconds=_ERROR_FILE_SECONDS, on_found=end))
