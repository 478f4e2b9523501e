"""Starts a script in several ranks of this machine, with every port on 127.0.0.1.

``torchrun`` starts its store on all networks of the machine, and gloo takes the address of the host's name: whoever
reaches these ports writes into the tests. Here the store and the environment are those of a local run's workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO
from unittest.mock import patch

from pipeline.cluster import rendezvous

SUPPORT = Path(__file__).parent
GUARD_SECONDS = 1200  # against hangs
GRACE_SECONDS = 30  # from SIGTERM to SIGKILL, as torchrun has it

Rank = subprocess.Popen[bytes]


def run_ranks(script: str, *arguments: object, world_size: int) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/support in ``world_size`` ranks and wait for their end; one that fails ends the others.

    Returns:
        The exit code of the rank that failed first, or 0, and what all ranks wrote.
    """
    command = [sys.executable, str(SUPPORT / script), *map(str, arguments)]
    with tempfile.TemporaryFile() as log:
        ranks = start(command, log, world_size)
        try:
            code = wait(ranks)
        finally:
            end(ranks)
        log.seek(0)
        return subprocess.CompletedProcess(command, code, stderr=log.read().decode(errors="replace"))


def start(command: list[str], log: IO[bytes], world_size: int) -> list[Rank]:
    port = rendezvous.serve("127.0.0.1")
    with patch.dict(os.environ, {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}):
        rendezvous.set_environment("127.0.0.1", port)
        environments = [os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return [subprocess.Popen(command, env=each, stdout=log, stderr=subprocess.STDOUT) for each in environments]


def wait(ranks: list[Rank]) -> int:
    """The first exit code that is not 0, or 0 once all have ended."""
    deadline = time.monotonic() + GUARD_SECONDS
    while time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(0.05)
    raise TimeoutError(f"{ranks} are at work after {GUARD_SECONDS} s")


def end(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        try:
            rank.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
