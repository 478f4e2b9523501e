"""A run that waits at a step while its test kills something: hold/sitecustomize.py, from the test's side."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoints.reader import list_checkpoints

_FOLDER = Path(__file__).parent / "hold"


def allow_holding(patch: pytest.MonkeyPatch) -> None:
    """Let the processes that start from now on wait where ``kill_in_training`` says so."""
    paths = (str(_FOLDER), os.environ.get("PYTHONPATH", ""))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def kill_in_training(run: Path, kill: Callable[[], None], *, checkpoint: int, held_at: int) -> threading.Thread:
    """Do ``kill`` in a thread as soon as the run in the folder ``run`` has a checkpoint of step ``checkpoint``.

    The run waits before its step ``held_at`` until that is done. A checkpoint is written in the background and only
    one at a time: where ``held_at`` is beyond the one after it, it is always there before the run waits.
    """
    hold = Path(f"{run}.hold")
    hold.write_text(str(held_at))

    def wait_and_kill() -> None:
        while not any(step >= checkpoint for step, _ in list_checkpoints(run / "checkpoints")):
            time.sleep(0.05)
        kill()
        hold.unlink()

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread
