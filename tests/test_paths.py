"""Where relative paths lie: on a disk, or in the bucket that GPT25_HOME names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.paths import resolve_output, resolve_path, working_folder
from pipeline.sources.sources import resolve_source


def test_relative_paths_count_from_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT25_HOME", "gs://bucket/folder/")
    assert resolve_output("data/mine").url == "gs://bucket/folder/data/mine"
    assert resolve_output("s3://other/x").url == "s3://other/x"
    assert resolve_output(str(tmp_path)).url == str(tmp_path)
    assert resolve_source("raw/*.parquet") == "gs://bucket/folder/raw/*.parquet"
    assert resolve_source("installed-docs") == "installed-docs"
    assert resolve_path(str(tmp_path)) == tmp_path
    assert working_folder() == Path.home() / "gpt-2.5"  # of what must lie on a disk
    with pytest.raises(UserError, match=r"gs://bucket/folder/out: only folders .* absolute path"):
        resolve_path("out")


def test_relative_paths_count_from_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    assert resolve_output("data").url == str(tmp_path / "data")
    assert resolve_path("~/x") == Path.home() / "x"
    monkeypatch.delenv("GPT25_HOME")
    assert resolve_path("data") == Path.cwd() / "data"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # under `ray job submit` that is a throw-away copy
    assert resolve_path("data") == Path.home() / "gpt-2.5/data"
