"""Every file format that the project reads, damaged at random: a sentence or a value, below 1 GB.

GPT25_FUZZ_SECONDS (600) and GPT25_FUZZ_SEED (2026) set how long and with which draws. In the end each kind of file was
damaged as often; how many there were depends on the machine, which file was damaged how does not.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fuzz_process import TARGETS

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 10**9


def fuzz(folder: Path, seconds: float, seed: int) -> None:
    """Run the process; its last file is named where it fails."""
    command = [sys.executable, "-m", "tests.support.fuzz_process", str(folder / "files"), str(seconds), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = folder / "last_name"
    assert done.returncode == 0, f"{last.read_text() if last.exists() else ''}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    logging.getLogger(__name__).info("%s", result)
    assert result["peak_bytes"] < MOST_BYTES, result
    tried = {name: result["read"].get(name, 0) + result["refused"].get(name, 0) for name in TARGETS}
    assert min(tried.values()) >= 2 and max(tried.values()) - min(tried.values()) <= 1, tried
    assert sum(result["refused"].values()) > len(TARGETS) // 2


def test_each_format_twice(tmp_path: Path) -> None:
    fuzz(tmp_path, seconds=0, seed=2026)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_format_for_long(tmp_path: Path) -> None:
    seconds, seed = os.environ.get("GPT25_FUZZ_SECONDS", "600"), os.environ.get("GPT25_FUZZ_SEED", "2026")
    fuzz(tmp_path, float(seconds), int(seed))
