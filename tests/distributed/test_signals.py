"""Requests to end a run: by a signal, or by a stop file."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipeline.distributed.signals import FileWatcher, call_in_thread, stop_on_signals


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

    watcher = FileWatcher(exists)
    deadline = time.monotonic() + 300  # only a test that would never end reaches it
    while not watcher():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watcher.close()
