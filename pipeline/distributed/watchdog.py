"""Ends a run that hangs, and logs where: rank, step, phase, and the Python stack of every thread.

A collective operation waits for ever for a rank that hangs. Ray Train and torchrun notice a process that ends, and
start the group again from the newest checkpoint; they do not notice one that waits. Heartbeats through the store of
the process group tell which rank it is: one that waits in a collective still sends them, one whose process or machine
hangs does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""The exit code EX_TEMPFAIL of sysexits.h, which means that another try may succeed."""
LONG_PHASE_SECONDS = 1800.0
"""Added to the limit for work that may well take minutes: compiling, evaluation, a checkpoint."""
_LOOKS_PER_LIMIT = 20
_STANDARD_ERROR = 2
_MOST_SECONDS_BETWEEN_LOOKS = 5.0
_HEARTBEAT_SECONDS = 5.0
_JOIN_SECONDS = 2.0


class Heartbeats:
    """A thread that writes to the store what this rank is doing, and reads what the others are doing.

    The store lives in one of the ranks: if that one hangs, so does the thread, and what was read last stays.

    Args:
        store: the store of the process group, used through a connection of its own.
        seconds: time between two heartbeats.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, seconds: float = _HEARTBEAT_SECONDS) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        self.place = "starting"
        own = store.clone()  # type: ignore[attr-defined]  # torch does not declare it
        self._store = dist.PrefixStore("heartbeats", own)
        self._seen: dict[int, tuple[int, str, float]] = {}  # rank: (beat number, place, time it changed)
        self._written = 0.0  # when the store last answered
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._written = time.monotonic()
        self._seen = {rank: (-1, "starting", time.monotonic()) for rank in range(self.world_size)}
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; this does not wait long for a store that hangs."""
        self._stopped.set()
        if self._thread is not None:  # torch prints a page if the store ends during a request
            self._thread.join(_JOIN_SECONDS)

    def rank_status(self) -> str:
        """The status of the other ranks, as the end of a sentence: which are silent, or where each of them waits."""
        now = time.monotonic()
        if now - self._written > 4 * self.seconds:
            return "; the ranks' common store, with rank 0, does not answer"
        others = {rank: seen for rank, seen in sorted(self._seen.items()) if rank != self.rank}
        silent = {rank: now - since for rank, (_, _, since) in others.items() if now - since > 4 * self.seconds}
        if silent:
            return "; " + ", ".join(f"rank {rank} has been silent for {age:.0f} s" for rank, age in silent.items())
        return "; " + ", ".join(f"rank {rank}: {place}" for rank, (_, place, _) in others.items()) if others else ""

    def _run(self) -> None:
        number = 0
        try:
            while True:
                self._store.set(str(self.rank), json.dumps([number, self.place]))
                self._read_others()
                number, self._written = number + 1, time.monotonic()
                if self._stopped.wait(self.seconds):
                    return
        except RuntimeError:  # the store is gone, and with it the run
            return

    def _read_others(self) -> None:
        for rank in range(self.world_size):
            if rank == self.rank or not self._store.check([str(rank)]):
                continue
            number, place = json.loads(self._store.get(str(rank)))
            if number != self._seen[rank][0]:
                self._seen[rank] = number, place, time.monotonic()


class Watchdog:
    """Ends this process when no step and no phase begins or ends for ``limit_seconds``.

    Only time during which the watchdog itself runs counts, so that a suspended machine or a stopped process is not
    taken for one that hangs.

    Args:
        rank: this rank, for the message.
        limit_seconds: longest time between two signs of progress.
        heartbeats: the heartbeats of all ranks, which tell which of them hangs; None in a run of one rank.
        exit_process: called at the end; tests replace it.
    """

    def __init__(
        self,
        *,
        rank: int,
        limit_seconds: float,
        heartbeats: Heartbeats | None = None,
        exit_process: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self.rank, self.limit_seconds, self.heartbeats, self._exit = rank, limit_seconds, heartbeats, exit_process
        self._waited = self._allowance = 0.0
        self._place = "before the first step"
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._waited = 0.0
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        if self.heartbeats is not None:
            self.heartbeats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self.heartbeats is not None:
            self.heartbeats.stop()
        if self._thread is not None:
            self._thread.join()

    def beat(self, place: str) -> None:
        """Report progress; ``place`` says what begins now, for the message."""
        self._place, self._waited = place, 0.0
        if self.heartbeats is not None:
            self.heartbeats.place = place

    @contextlib.contextmanager
    def step(self, number: int, *, is_long: bool) -> Iterator[None]:
        """A context for one step; a long one compiles."""
        place = f"in step {number}"
        self.beat(place)
        with self.phase(place) if is_long else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def phase(self, place: str) -> Iterator[None]:
        """A context for work that may take LONG_PHASE_SECONDS longer than the limit."""
        before, self._allowance = self._place, LONG_PHASE_SECONDS
        self.beat(place)
        try:
            yield
        finally:
            self._allowance = 0.0
            self.beat(before)

    def _watch(self) -> None:
        interval = min(self.limit_seconds / _LOOKS_PER_LIMIT, _MOST_SECONDS_BETWEEN_LOOKS)
        while not self._stopped.wait(interval):
            self._waited += interval
            if self._waited > self.limit_seconds + self._allowance:
                self._report_and_exit()
                return

    def _report_and_exit(self) -> None:
        others = self.heartbeats.rank_status() if self.heartbeats is not None else ""
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
        self._exit()
