"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.mlflow_server import serve


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of an MLflow server of this test alone."""
    with serve(f"sqlite:///{tmp_path / 'server.db'}", tmp_path / "artifacts") as server:
        yield server
