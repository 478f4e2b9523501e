"""The watchdog speaks when nothing moves, and only then; heartbeats tell who is silent; outcomes; signals."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopFileWatcher, call_in_thread, stop_on_signals
from pipeline.distributed.watchdog import Heartbeats, Watchdog
from pipeline.training.step_guard import Flags, StepOutcomes

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


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


@pytest.mark.parametrize(("norm_squared", "loss", "failed"), [(math.inf, 1.0, 0), (4.0, math.nan, 0), (4.0, 1.0, 1)])
def test_after_a_bad_step_nothing_is_allowed_until_the_host_says_so(
    norm_squared: float, loss: float, failed: int
) -> None:
    outcomes = StepOutcomes(ALONE)

    def add(step: int, norm: float, loss: float, flags: Flags) -> bool:
        return bool(outcomes.all_reduce(step, torch.tensor(norm), torch.tensor(loss), flags).allowed)

    assert add(0, 4.0, 1.0, Flags())
    assert not add(1, norm_squared, loss, Flags(failed=bool(failed)))
    assert not add(2, 4.0, 1.0, Flags())
    first, second, _ = outcomes.take(everything=False)
    assert (first.step, first.loss, first.grad_norm, first.is_finite, first.needs_sync) == (0, 1.0, 2.0, True, False)
    assert (second.is_finite, second.needs_sync) == (bool(failed), bool(failed))
    outcomes.resume_updates()
    assert add(2, 4.0, 1.0, Flags(stop=True))
    (third,) = outcomes.take(everything=True)
    assert third.flags.stop and third.needs_sync and not third.flags.check_preemption


def test_the_first_signal_is_a_request_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    told: list[int] = []
    with stop_on_signals(lambda: told.append(1)) as request:
        assert not request()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request() and request.signal_number == signal.SIGTERM
    assert told == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_reaches_the_main_thread_while_the_work_is_in_another() -> None:
    with stop_on_signals() as request:

        def work() -> str:
            os.kill(os.getpid(), signal.SIGINT)
            while not request():
                time.sleep(0.01)
            return "stopped"

        assert call_in_thread(work) == "stopped"


def test_an_error_in_the_thread_is_the_callers() -> None:
    with pytest.raises(ValueError, match="mine"):
        call_in_thread(lambda: (_ for _ in ()).throw(ValueError("mine")))


def test_a_stop_file_is_found_though_its_storage_fails_at_first() -> None:
    answers: list[bool | OSError] = [OSError("not now"), False, True]

    def exists() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    watcher = StopFileWatcher(exists)
    deadline = time.monotonic() + 30
    while not watcher():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watcher.close()
