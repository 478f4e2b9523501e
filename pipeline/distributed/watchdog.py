"""A run that stands still ends, and says where: which rank, which step, which phase, and every thread's Python stack.

A collective operation waits for ever for a rank that has stopped. Whoever started the workers (Ray Train, torchrun)
sees a process that ends, and starts the group again from the newest checkpoint; it does not see one that waits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Iterator

from pipeline.distributed.heartbeats import Heartbeats

logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: worth another try."""
LONG_PHASE_SECONDS = 1800.0
"""On top of the limit for what takes minutes without anything being wrong: compiling, evaluation, a checkpoint."""
_LOOKS_PER_LIMIT = 20
_STANDARD_ERROR = 2
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class Watchdog:
    """Ends this process when no step and no phase begins or ends for ``limit_seconds``.

    Counted is the time during which the watchdog itself ran, so that a machine that was suspended, or a process that
    was stopped and continued, is not taken for one that hangs.

    Args:
        rank: named in the message.
        limit_seconds: between two signs of progress.
        heartbeats: of all ranks, to tell which of them stands still; may be None.
        end: called instead of ending the process (for tests).
    """

    def __init__(
        self,
        *,
        rank: int,
        limit_seconds: float,
        heartbeats: Heartbeats | None = None,
        end: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self.rank, self.limit_seconds, self.heartbeats, self._end = rank, limit_seconds, heartbeats, end
        self._waited = self._allowance = 0.0
        self._place = "before the first step"
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._waited = 0.0
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        if self.heartbeats is not None:
            self.heartbeats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.heartbeats is not None:
            self.heartbeats.stop()
        if self._thread is not None:
            self._thread.join()

    def beat(self, place: str) -> None:
        """A sign of progress. ``place``: what begins now, for the message."""
        self._place, self._waited = place, 0.0
        if self.heartbeats is not None:
            self.heartbeats.place = place

    @contextlib.contextmanager
    def step(self, number: int, *, is_long: bool) -> Iterator[None]:
        """What happens inside is one step; a long one compiles."""
        place = f"in step {number}"
        if is_long:
            with self.phase(place):
                yield
            return
        self.beat(place)
        yield

    @contextlib.contextmanager
    def phase(self, place: str) -> Iterator[None]:
        """What happens inside may take LONG_PHASE_SECONDS more."""
        before, self._allowance = self._place, LONG_PHASE_SECONDS
        self.beat(place)
        try:
            yield
        finally:
            self._allowance = 0.0
            self.beat(before)

    def _watch(self) -> None:
        interval = min(self.limit_seconds / _LOOKS_PER_LIMIT, _MOST_SECONDS_BETWEEN_LOOKS)
        while not self._over.wait(interval):
            self._waited += interval
            if self._waited > self.limit_seconds + self._allowance:
                self._bark()
                return

    def _bark(self) -> None:
        others = self.heartbeats.describe() if self.heartbeats is not None else ""
        logger.error(
            "rank %d stands still: nothing has happened for %.0f seconds, %s%s; the worker ends, so that its group is "
            "started again from the newest checkpoint (--collective_timeout sets the limit); what its threads do:",
            self.rank,
            self._waited,
            self._place,
            others,
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        faulthandler.dump_traceback(file=_STANDARD_ERROR, all_threads=True)
        self._end()
