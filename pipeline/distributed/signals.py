"""Ending a run early: what a signal, Ray's job control or a node that is about to leave set going.

The process that the user started has the signal; the workers that train may be on other machines. Between them is a
note, a file in the run's folder: the driver writes it, rank 0 looks for it, and the ranks agree at the end of a step
(training/outcomes.py). Under torchrun the workers have the signal themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from pipeline.errors import UserError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.5
_NOTE_SECONDS = 5.0  # every worker looks, into a bucket too
_GRACE_SECONDS = 10.0
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h, as of the watchdog

Result = TypeVar("Result")


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Interruptions:
    """What may end a run early, as one rank learns of it."""

    stop_asked: Callable[[], bool] = _never
    """Whether this process was asked to end the run; asked at every step, so it has to be cheap."""
    nodes_leaving: Callable[[], bool] | None = None
    """Whether a node of the run is about to be taken away; collective, asked every few seconds by all ranks at once."""


class StopRequest:
    """Whether, and by which signal, this process was asked to end its run; may be asked and read from any thread."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __call__(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_on_signals(when_asked: Callable[[], object] = lambda: None) -> Iterator[StopRequest]:
    """Inside, SIGTERM and Ctrl-C are a request to end the run; a second signal ends the process at once.

    For the main thread; elsewhere the request is never made.

    Args:
        when_asked: called once, by the main thread, at the first signal.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        request.signal_number = number
        logger.warning(
            "%s: the run ends after this step and one more checkpoint; again to end it at once",
            signal.Signals(number).name,
        )
        try:
            when_asked()
        except UserError as error:
            logger.warning("the workers cannot be told: %s", error)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call_in_thread(action: Callable[[], Result]) -> Result:
    """``action()`` in a thread, so that the signals stay the main thread's, and with whom it has given them to."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="interruptible") as thread:
        return thread.submit(action).result()


class NoteWatcher:
    """Looks for a note from time to time, in a thread of its own: a look into a bucket takes its time.

    Args:
        exists: whether the note is there; a storage that does not answer now is asked again.
    """

    def __init__(self, exists: Callable[[], bool]) -> None:
        self._exists = exists
        self._found = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-note", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """Whether the note was there; false again never."""
        return self._found

    def close(self) -> None:
        """Stop looking."""
        self._over.set()

    def _watch(self) -> None:
        while not self._found and not self._over.wait(_LOOK_SECONDS):
            with contextlib.suppress(UserError, OSError):
                self._found = self._exists()


class OthersError:
    """Ends this process when another worker of its group has left with an error and this one waits for it for ever.

    Over gloo a collective fails as soon as a process leaves; over NCCL it may wait on. A context: inside, a thread
    looks for the other worker's note, and allows some seconds for a good end.

    Args:
        exists: whether the note is there.
        tell: called before the end.
        end: called instead of ending the process (for tests).
    """

    def __init__(
        self,
        exists: Callable[[], bool],
        tell: Callable[[], object],
        end: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self._exists, self._tell, self._end = exists, tell, end
        self._over = threading.Event()

    def __enter__(self) -> OthersError:
        threading.Thread(target=self._watch, name="others-error", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(_NOTE_SECONDS):
            try:
                is_there = self._exists()
            except (UserError, OSError):  # a storage that does not answer now is asked again
                continue
            if is_there:
                if not self._over.wait(_GRACE_SECONDS):
                    logger.error("another worker has left with an error, and this one waits for it: it ends too")
                    self._tell()
                    self._end()
                return
