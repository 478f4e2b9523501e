"""Conditions of the machine that once ended in a traceback: one sentence, or work as usual."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import open_run
from tests.support.fixtures import ROOT


@pytest.mark.parametrize("what", ["argument", "current folder"])
def test_names_that_are_not_utf8(tmp_path: Path, what: str) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)  # noqa: PTH102  pathlib takes no bytes
    source = odd if what == "argument" else os.fsencode(tmp_path)
    command = [os.fsencode(sys.executable), os.fsencode(ROOT / "jobs/tokenize.py"), b"--source", source, b"--dry_run"]
    folder = odd if what == "current folder" else os.fsencode(tmp_path)
    result = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=1200)
    assert result.returncode == 1
    assert result.stderr.decode().startswith(f"error: the {what} {tmp_path}/caf\\xe9 is not UTF-8 text; rename")
    assert b"Traceback" not in result.stderr


def test_a_working_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc, where nobody can make a file, not even root; sqlite itself would be tried for two minutes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"the working folder /proc, where MLflow's mlflow\.db would be, cannot"):
        open_run(
            tracking_uri=None,
            experiment="e",
            folder=open_folder(tmp_path / "out"),
            working_folder=Path("/proc"),
            job="tokenize",
        )
    assert not (tmp_path / "out").exists()
