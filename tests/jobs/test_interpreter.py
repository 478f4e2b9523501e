"""A Python that cannot run the jobs is one sentence with the cure; what is printed names the Python that can."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import _interpreter
from jobs._run import guarded
from pipeline.console import python_command
from pipeline.tracking.mlflow_run import MLflowRun

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", JOBS)
def test_a_python_without_the_packages(name: str, tmp_path: Path) -> None:
    """-S hides the packages of the environment, as the system's Python has none."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", str(ROOT / "jobs" / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {sys.executable} has no package yaml, which the jobs need; run `")
    assert "activate`" in line


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"error: .* is Python 3\.9, but 3\.11 or newer is needed; run `"):
        _interpreter.require_version()


def test_a_package_that_a_job_looks_for_late() -> None:
    def job() -> None:
        importlib.import_module("a_package_that_is_nowhere.within")

    with pytest.raises(SystemExit, match="has no package a_package_that_is_nowhere, which the jobs need"):
        guarded(job, resume="goes on")


def test_a_module_of_ours_that_is_missing_is_no_missing_package() -> None:
    def job() -> None:
        importlib.import_module("pipeline.no_such_module")

    with pytest.raises(ModuleNotFoundError):
        guarded(job, resume="goes on")


@pytest.mark.parametrize(("there", "words"), [(True, "run `. "), (False, "run `make setup` in ")])
def test_the_cure_depends_on_what_is_installed(
    there: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    if there:
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/activate").touch()
    monkeypatch.setattr(_interpreter, "__file__", str(tmp_path / "jobs/_interpreter.py"))
    assert _interpreter.cure().startswith(words)
    monkeypatch.chdir(tmp_path)
    if there:
        assert _interpreter.cure() == "run `. .venv/bin/activate` first, once in a terminal"


def test_the_interpreter_in_use_is_named_as_one_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "my project/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path / "my project")
    assert python_command() == ".venv/bin/python"
    monkeypatch.chdir("/")
    assert python_command() == (f"'{str(python).removeprefix('/')}'")
    monkeypatch.setenv("PATH", str(python.parent))
    assert python_command() == "python"
    monkeypatch.chdir(tmp_path / "my project/.venv")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert python_command() == f"'{python}'"


def test_make_ui_is_told_where_a_run_is_that_it_would_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    here, away = f"sqlite:///{tmp_path}/mlflow.db", "sqlite:////home/me/gpt-2.5/mlflow.db"

    def location(uri: str) -> str:
        return MLflowRun(tracking_uri=uri, experiment_id="1", run_id="abc").location

    assert location(here).endswith("(make ui shows it)")
    assert location(away).endswith(f"(MLFLOW_TRACKING_URI={away} make ui shows it)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
    assert location(away).endswith("(make ui shows it)")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a submitted job: the terminal is another machine's
    assert location(away).endswith(f"(MLFLOW_TRACKING_URI={away} make ui shows it)")
