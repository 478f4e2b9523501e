"""The watchdog speaks when nothing moves, and only then; heartbeats tell who is silent."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from pipeline.distributed.watchdog import Heartbeats, Watchdog


def test_silence_ends_the_process_and_says_where(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    with Watchdog(rank=3, limit_seconds=0.2, exit_process=ended.set) as watchdog, watchdog.step(7, is_long=False):
        assert ended.wait(30)
    assert "rank 3 stands still: nothing has happened for" in caplog.text and "in step 7" in caplog.text
    assert "test_silence_ends_the_process_and_says_where" in capfd.readouterr().err, "this thread's stack"


def test_progress_and_long_phases_are_no_silence() -> None:
    ended = threading.Event()
    with Watchdog(rank=0, limit_seconds=1.0, exit_process=ended.set) as watchdog:
        with watchdog.phase("in an evaluation"):
            time.sleep(1.5)
        for step in range(15):
            with watchdog.step(step, is_long=False):
                time.sleep(0.1)
    assert not ended.is_set()


def test_a_silent_rank_is_told_from_one_that_waits() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Heartbeats(store, rank=rank, world_size=3, seconds=0.05) for rank in range(3)]
    for rank in ranks:
        rank.place = f"in step {rank.rank}"
        rank.start()
    deadline = time.monotonic() + 30
    while ranks[0].rank_status() != "; rank 1: in step 1, rank 2: in step 2":
        assert time.monotonic() < deadline, ranks[0].rank_status()
        time.sleep(0.02)
    ranks[2].stop()
    while "rank 2 has been silent for" not in ranks[0].rank_status():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for rank in ranks:
        rank.stop()
