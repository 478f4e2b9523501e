"""Ctrl-C and SIGTERM from the first to the last moment of a command: one closing line, and exit code 130 or 143.

The first signal raises Interrupted in the main thread: half-written files go and locks are released as it passes. Code
of others may swallow it, or not come back to Python for long (Ray as it starts, an import, a compiler), so a thread
ends the process some seconds after the signal in any case. Whoever has something to save suspends both
(distributed/signals.py). Senders repeat themselves: `timeout` tells the process and then its group.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0
"""A further signal within this time after the first is the same request."""
_UNWIND_SECONDS = 2.5
_SHUTDOWN_SECONDS = 6.0

_ending = threading.Lock()  # held by the thread that ends the process


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by SIGINT and SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class _Watch:
    """What is known of the signals of this process, which has one watch at most."""

    def __init__(self, closing_line: str) -> None:
        self.closing_line = closing_line
        self.signal_number: int | None = None
        self.since = 0.0
        self.num_suspensions = 0
        self._has_raised = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)
        self._before: dict[int, object] = {}
        self._wakeup = -1

    def start(self) -> None:
        self._before = {number: signal.getsignal(number) for number in NUMBERS}
        self.take_handlers()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="exit-signals", daemon=True).start()

    def take_handlers(self) -> None:
        """Set the handlers, again where somebody has replaced them."""
        for number in NUMBERS:
            signal.signal(number, self._handle)

    def stop(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as it was
        self._writer.close()  # ends the thread

    def note(self, number: int) -> None:
        if self.signal_number is None:
            self.signal_number, self.since = number, time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.note(number)
        if not self._has_raised:
            self._has_raised = True
            raise Interrupted(number)
        if time.monotonic() - self.since > SAME_SECONDS:
            end(number, self.closing_line)

    def _read(self) -> None:
        """The C part of Python writes a byte as a signal arrives, also while the main thread is in other code."""
        deadline: float | None = None
        while True:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._reader], [], [], seconds)
            if not ready:
                assert self.signal_number is not None
                end(self.signal_number, self.closing_line)
            if not (numbers := self._reader.recv(64)):  # closed by stop
                self._reader.close()
                return
            if deadline is None and not self.num_suspensions and (known := [n for n in numbers if n in NUMBERS]):
                self.note(known[0])
                deadline = time.monotonic() + _UNWIND_SECONDS


_WATCHES: list[_Watch] = []  # one at most


@contextlib.contextmanager
def watched(closing_line: str) -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise Interrupted, and end the process soon after in any case.

    Nothing happens in another thread than the main one.

    Args:
        closing_line: what is printed where the process has to be ended.
    """
    if threading.current_thread() is not threading.main_thread() or _WATCHES:
        yield
        return
    watch = _Watch(closing_line)
    _WATCHES.append(watch)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
        _WATCHES.remove(watch)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """A context whose code sets handlers of its own and decides itself when the process ends."""
    watches = list(_WATCHES)
    for watch in watches:
        watch.num_suspensions += 1
    try:
        yield
    finally:
        for watch in watches:
            watch.num_suspensions -= 1


def hand_over() -> None:
    """For the rest of the watch the handlers that the caller sets decide."""
    for watch in _WATCHES:
        watch.num_suspensions += 1


def take_handlers() -> None:
    """Set the handlers of the watch again, after a library has set its own; without a watch nothing happens."""
    if threading.current_thread() is threading.main_thread():
        for watch in _WATCHES:
            watch.take_handlers()


def interrupt(signal_number: int) -> NoReturn:
    """Raise Interrupted for a signal that the handler of a library has taken, maybe before the watch knows of it."""
    for watch in _WATCHES:
        watch.note(signal_number)
    raise Interrupted(signal_number)


def received() -> int | None:
    """The signal that has interrupted this process; None where there was none."""
    return next((watch.signal_number for watch in _WATCHES), None)


def end(signal_number: int, closing_line: str) -> NoReturn:
    """Print ``closing_line`` and end the process now, as a shell shows a signal: 130 for SIGINT, 143 for SIGTERM.

    Nothing else is run: Ray's own end takes seconds, and has crashed where its start was interrupted. The kernel ends
    the processes of a local Ray with this one; a cluster notices that it is gone.
    """
    _ending.acquire()
    # a reader that stands still must not hold the process, nor a print that the signal came into cost the line
    with contextlib.suppress(Exception):
        if select.select([], [sys.stdout], [], 0)[1]:
            sys.stdout.flush()
    with contextlib.suppress(Exception):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{closing_line}\n".encode("utf-8", "replace"))
    os._exit(128 + signal_number)


def end_soon(signal_number: int) -> None:
    """See to it that this process, which has said all and is about to end, does so in some seconds."""

    def wait() -> None:
        time.sleep(_SHUTDOWN_SECONDS)
        os._exit(128 + signal_number)

    threading.Thread(target=wait, name="exit-soon", daemon=True).start()


def end_quietly_until_watched() -> None:
    """For the imports of a script, before it can say what the same command does: one line, and the exit code."""
    for number in NUMBERS:
        signal.signal(number, lambda found, _: end(found, "interrupted before anything began"))
