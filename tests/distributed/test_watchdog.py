"""The watchdog speaks when nothing moves, and only then; heartbeats tell who is silent."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from pipeline.distributed import watchdog as watchdog_module
from pipeline.distributed.watchdog import Heartbeats, Watchdog

HANG_SECONDS = 1200
"""Only a test that would never end reaches it."""


def test_silence_ends_the_process_and_says_where(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    with Watchdog(rank=3, limit_seconds=0.2, exit_process=ended.set) as watchdog, watchdog.step(7, is_long=False):
        assert ended.wait(HANG_SECONDS)
    assert "rank 3 stands still: nothing has happened for" in caplog.text and "in step 7" in caplog.text
    assert "test_silence_ends_the_process_and_says_where" in capfd.readouterr().err, "this thread's stack"


class Looks(threading.Event):
    """In place of time: the watchdog looks when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self._waits, self._goes_on = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.release()
        self._goes_on.acquire()
        return self.is_set()

    def set(self) -> None:
        super().set()
        self._goes_on.release()

    def take(self, count: int) -> None:
        """Let the watchdog look ``count`` times, each time as its interval has passed."""
        for _ in range(count):
            assert self._waits.acquire(timeout=HANG_SECONDS)
            self._goes_on.release()
        assert self._waits.acquire(timeout=HANG_SECONDS)  # it has done what it does after the last look
        self._waits.release()


def test_progress_and_long_phases_are_no_silence() -> None:
    limit = watchdog_module._LOOKS_PER_LIMIT
    ended = threading.Event()
    watchdog = Watchdog(rank=0, limit_seconds=1.0, exit_process=ended.set)
    watchdog._stopped = looks = Looks()
    with watchdog:
        with watchdog.phase("in an evaluation"):
            looks.take(2 * limit)
        for step in range(15):
            with watchdog.step(step, is_long=False):
                looks.take(limit - 1)
        assert not ended.is_set()
        with watchdog.step(15, is_long=False):
            looks._waits.acquire()
            for _ in range(limit + 2):  # the last look ends the watchdog, which waits for no other
                looks._goes_on.release()
            assert ended.wait(HANG_SECONDS), "the same looks without progress are silence"


def test_a_silent_rank_is_told_from_one_that_waits() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Heartbeats(store, rank=rank, world_size=3, seconds=0.05) for rank in range(3)]
    for rank in ranks:
        rank.place = f"in step {rank.rank}"
        rank.start()
    deadline = time.monotonic() + HANG_SECONDS
    while ranks[0].rank_status() != "; rank 1: in step 1, rank 2: in step 2":
        assert time.monotonic() < deadline, ranks[0].rank_status()
        time.sleep(0.02)
    ranks[2].stop()
    while "rank 2 has been silent for" not in ranks[0].rank_status():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for rank in ranks:
        rank.stop()
