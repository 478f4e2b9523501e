"""A run of one worker on the CPU of this machine: it trains in the process of the job, without Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from pipeline.checkpoints.reader import list_checkpoints
from pipeline.cluster.workers import GroupSettings, fits_this_process
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import recorded_run_id
from pipeline.training import launch
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.fixtures import ROOT
from tests.support.ray_environment import own_environment

WITHOUT_END = 1_000_000


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread: on a busy machine two wait for each other
    return tiny_config(data=str(tiny_data), output="run", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def start(config: PretrainConfig, home: Path) -> subprocess.Popen[str]:
    """jobs/pretrain.py with these settings."""
    settings = {name: value for name, value in to_dict(config).items() if value != getattr(PretrainConfig(), name)}
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *(f"--{n}={v}" for n, v in settings.items())]
    environment = own_environment() | {"GPT25_HOME": str(home)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def status(home: Path) -> str:
    run_id = recorded_run_id(open_folder(str(home / "run")))
    assert run_id is not None
    return str(MlflowClient(f"sqlite:///{home}/mlflow.db").get_run(run_id).info.status)


@pytest.mark.parametrize(
    ("num_workers", "device", "variable", "fits"),
    [
        (1, "cpu", "", True),
        (1, "auto", "", True),
        ("1:1", "cpu", "", True),
        (2, "cpu", "", False),
        ("1:2", "cpu", "", False),
        (1, "cuda", "", False),
        (1, "cpu", "RAY_ADDRESS", False),
        (1, "cpu", "RAY_JOB_CONFIG_JSON_ENV_VAR", False),
    ],
)
def test_only_one_worker_on_a_cpu_and_no_cluster_fits(
    num_workers: int | str, device: Any, variable: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if variable:
        monkeypatch.setenv(variable, "127.0.0.1:6379")
    assert fits_this_process(GroupSettings(num_workers=num_workers, device=device)) is fits


def test_a_gpu_has_a_worker_of_its_own_which_ray_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not fits_this_process(GroupSettings(num_workers=1, device="auto"))


def test_ctrl_c_and_sigterm_stop_behind_a_checkpoint_and_the_same_command_goes_on(
    config: PretrainConfig, tmp_path: Path
) -> None:
    long = dataclasses.replace(config, train_steps=WITHOUT_END, checkpoint_every=20, val_every=WITHOUT_END)
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        job = start(long, tmp_path)
        deadline = time.monotonic() + 1200
        while max((step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")), default=0) < before + 20:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        job.send_signal(number)
        output, _ = job.communicate(timeout=1200)
        assert job.returncode == 128 + number, output
        stopped = list_checkpoints(tmp_path / "run/checkpoints")[-1][0]
        assert f"stopped at step {stopped} of {WITHOUT_END}; the same command goes on from there" in output
        assert "Traceback" not in output and "Ray" not in output
        assert (f"resuming at step {before}" if before else "starting at step 0") in output
        assert status(tmp_path) == "KILLED"
        for name in ("driver", "rank-000"):
            assert f"stopped at step {stopped}" in (tmp_path / f"run/logs/{name}.log").read_text()
        before = stopped
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(("stop-", "begun-"))]


def test_the_run_is_in_mlflow_as_any_other_and_ray_is_not_started(config: PretrainConfig, tmp_path: Path) -> None:
    was_there, variables = ray.is_initialized(), dict(os.environ)
    summary, run = launch.pretrain(config)
    assert ray.is_initialized() == was_there
    new = {name for name, value in os.environ.items() if variables.get(name) != value}
    of_libraries = ("MLFLOW_", "TORCHINDUCTOR_")
    assert not [name for name in new if not name.startswith(of_libraries)], "what starts later inherits nothing of it"
    assert (summary.steps, status(tmp_path)) == (config.train_steps, "FINISHED")
    points = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
    assert [point.step for point in points] == list(range(1, config.train_steps + 1))
    assert launch.pretrain(config) == (summary, run), "it is finished"


def test_an_error_of_the_user_is_that_error(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="run/checkpoints cannot be made: there is a file of that name"):
        launch.pretrain(config)
    assert status(tmp_path) == "FAILED"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such value"), r"^a worker cannot go on: ValueError: no such value \(.*test_in_process"),
        (RuntimeError("the device is gone"), "^the device is gone$"),
    ],
)
def test_an_error_of_the_program_fails_the_run(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(trainer: Trainer) -> None:
        raise error

    works = Trainer.run
    monkeypatch.setattr(Trainer, "run", fail)
    with pytest.raises((UserError, RuntimeError), match=words):
        launch.pretrain(config)
    assert status(tmp_path) == "FAILED"
    log = (tmp_path / "run/logs/rank-000.log").read_text()
    assert "Traceback (most recent call last)" in log and f"{type(error).__name__}: {error}" in log
    monkeypatch.setattr(Trainer, "run", works)
    assert launch.pretrain(config)[0].steps == config.train_steps, "the same command goes on"
    assert status(tmp_path) == "FINISHED"
