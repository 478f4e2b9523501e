"""Four workers under a real Ray: a killed worker and a killed job go on and end with the same bits."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from safetensors.torch import load_file

from pipeline.checkpoints.reader import list_checkpoints
from pipeline.cluster import ray_cluster, workers
from pipeline.cluster.workers import GroupSettings, SharedFiles, WorkerOutcome, run_workers
from pipeline.config.inference import EvaluateConfig
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.training import launch
from pipeline.training.run_folder import RunSummary
from tests.support.factories import tiny_config
from tests.support.holding import allow_holding, kill_in_training
from tests.support.ray_environment import own_environment

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
KILL_AFTER = 20
HELD_AT = 27
"""The step before which a run waits until it is killed; checkpoints are written every 5 steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a local Ray of four logical CPUs."""
    path = tmp_path_factory.mktemp("launch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT25_HOME", str(path))
        allow_holding(patch)
        ray_cluster.connect(num_cpus=4)
        yield path
        ray_cluster.shut_down()


@pytest.fixture(scope="module")
def config(tiny_data: Path) -> PretrainConfig:
    return tiny_config(
        data=str(tiny_data),
        output="clean",
        train_steps=STEPS,
        lr=5e-3,
        val_every=30,
        sample_every=30,
        checkpoint_every=5,
        num_workers=4,
    )


@pytest.fixture(scope="module")
def clean(folder: Path, config: PretrainConfig) -> tuple[RunSummary, MLflowRun]:
    """A run that nobody disturbed."""
    return launch.pretrain(config)


def training_workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in process.name()]


def losses(run: MLflowRun) -> list[tuple[int, float]]:
    points = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
    return [(point.step, point.value) for point in points]


def same_result(summary: RunSummary, expected: RunSummary) -> bool:
    fields = ("steps", "tokens_seen", "first_loss", "last_loss", "val_loss", "val_tokens", "sample")
    return all(getattr(summary, name) == getattr(expected, name) for name in fields)


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    files = sorted((run / f"checkpoints/step-{step:06d}").glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_four_workers_train_and_everything_is_in_mlflow(clean: tuple[RunSummary, MLflowRun], folder: Path) -> None:
    summary, run = clean
    assert summary.last_loss < summary.first_loss - 0.7
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    found = MlflowClient(run.tracking_uri).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.inputs is not None
    assert {tag.value for i in found.inputs.dataset_inputs for tag in i.tags} == {"training", "validation", "tokenizer"}
    assert run.tracking_uri == f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(run.tracking_uri)
    steps = {int(model.tags["step"]) for model in client.search_logged_models([run.experiment_id])}
    assert steps == set(range(5, STEPS + 1, 5))


def test_a_finished_run_is_not_run_again(clean: tuple[RunSummary, MLflowRun], config: PretrainConfig) -> None:
    assert launch.pretrain(config) == clean


def test_a_killed_worker_is_replaced_and_the_result_is_the_same(
    clean: tuple[RunSummary, MLflowRun], config: PretrainConfig, folder: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        victim = training_workers()[2]
        killed.append(victim.pid)
        victim.kill()

    thread = kill_in_training(folder / "worker-killed", kill_one, checkpoint=KILL_AFTER, held_at=HELD_AT)
    summary, run = launch.pretrain(dataclasses.replace(config, output="worker-killed"))
    thread.join(1200)
    assert len(killed) == 1
    assert same_result(summary, clean[0])
    assert losses(run) == losses(clean[1]), "no point is missing or doubled"


def test_a_killed_job_goes_on_with_the_same_command(
    clean: tuple[RunSummary, MLflowRun], config: PretrainConfig, folder: Path
) -> None:
    settings = to_dict(dataclasses.replace(config, output="job-killed"))
    flags = [f"--{name}={value}" for name, value in settings.items() if value != getattr(PretrainConfig(), name)]
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *flags]
    # A cluster of its own: it dies with the job, as on a laptop that loses power.
    first = subprocess.Popen(command, env=own_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_in_training(folder / "job-killed", first.kill, checkpoint=KILL_AFTER, held_at=HELD_AT).join(1200)
    assert first.wait(1200) == -9
    steps_kept = [step for step, _ in list_checkpoints(folder / "job-killed" / "checkpoints")]
    assert KILL_AFTER <= steps_kept[-1] <= HELD_AT
    second = subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=1200, check=False)
    assert second.returncode == 0, second.stderr
    assert "resuming at step" in second.stdout + second.stderr
    summary, run = launch.pretrain(dataclasses.replace(config, output="job-killed"))  # finished: read, not run
    assert same_result(summary, clean[0])
    assert losses(run) == losses(clean[1]), "no point is missing or doubled"


def test_a_new_run_starts_from_the_newest_weights_of_another(
    clean: tuple[RunSummary, MLflowRun], config: PretrainConfig, folder: Path
) -> None:
    tiny_step = dataclasses.replace(config, output="tuned", checkpoint="clean", train_steps=1, lr=1e-9)
    summary, _ = launch.pretrain(tiny_step)
    assert summary.val_loss == pytest.approx(clean[0].val_loss, abs=1e-4)  # one step at this rate moves nothing


def test_evaluation_on_two_workers_equals_one(clean: tuple[RunSummary, MLflowRun], folder: Path) -> None:
    alone = evaluate_job.evaluate(EvaluateConfig(checkpoint="clean", device="cpu", batch_size=4))
    together = evaluate_job.evaluate(EvaluateConfig(checkpoint="clean", device="cpu", batch_size=4, num_workers=2))
    assert together.val_tokens == alone.val_tokens
    assert together.val_loss == pytest.approx(alone.val_loss, rel=1e-6)  # float32 means, added up in float64
    assert alone.unigram_entropy is not None and alone.val_loss is not None
    assert alone.learned == pytest.approx(alone.unigram_entropy - alone.val_loss)


def test_one_worker_of_ray_gives_the_bits_of_one_in_this_process(
    config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run may begin on a laptop and go on in a cluster."""
    short = dataclasses.replace(config, num_workers=1, train_steps=10, output="one-here")
    here, run_here = launch.pretrain(short)
    monkeypatch.setenv("RAY_ADDRESS", "a cluster, which this process has joined already")
    there, run_there = launch.pretrain(dataclasses.replace(short, output="one-there"))
    assert same_result(here, there) and losses(run_here) == losses(run_there)
    here_weights, there_weights = tensors(folder / "one-here", 10), tensors(folder / "one-there", 10)
    assert here_weights.keys() == there_weights.keys() and here_weights
    assert all(torch.equal(tensor, there_weights[name]) for name, tensor in here_weights.items())


def test_a_mistake_in_a_worker_is_one_error_and_no_retry(
    clean: tuple[RunSummary, MLflowRun], config: PretrainConfig, folder: Path
) -> None:
    output = folder / "no-space"
    output.mkdir()
    (output / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="no-space/checkpoints cannot be made: there is a file of that name"):
        launch.pretrain(dataclasses.replace(config, output=str(output)))


def test_more_workers_than_the_cluster_has_cpus_is_said_at_once(config: PretrainConfig, folder: Path) -> None:
    with pytest.raises(UserError, match="5 workers need 5 CPUs, but the cluster has 4"):
        launch.pretrain(dataclasses.replace(config, output="many", num_workers=5))


def test_gpus_that_the_cluster_does_not_have_are_said_at_once(config: PretrainConfig, folder: Path) -> None:
    with pytest.raises(UserError, match="--device cuda was asked for, but the cluster has no GPU"):
        launch.pretrain(dataclasses.replace(config, output="gpu", device="cuda"))


def environment_of_sums(settings: None, files: SharedFiles) -> dict[str, str | None]:
    """What a worker's process group was made with."""
    assert torch.distributed.is_initialized()
    return {name: os.environ.get(name) for name in ("NCCL_ALGO", "NCCL_NVLS_ENABLE")}


@pytest.mark.parametrize(("deterministic", "expected"), [("on", ("Ring", "0")), ("off", (None, None))])
def test_sums_over_workers_are_made_deterministic_before_the_group_is_made(
    deterministic: Literal["on", "off"], expected: tuple[str, str], config: PretrainConfig, folder: Path
) -> None:
    group = launch.group_settings(dataclasses.replace(config, num_workers=1, deterministic=deterministic))
    found = run_workers(environment_of_sums, None, group, open_folder(str(folder)))
    assert tuple(found.values()) == expected


class Starts:
    """Ray Train's answer, one after the other: a worker that dies in the moment when it gets its work, or a result."""

    def __init__(self, *, lost: int) -> None:
        self.lost, self.number = lost, 0

    def __call__(self, *_: object) -> WorkerOutcome:
        self.number += 1
        if self.number > self.lost:
            return WorkerOutcome(result={"steps": 1})
        raise ControllerError(ActorDiedError())


def run_starts(starts: Starts, folder: Path, monkeypatch: pytest.MonkeyPatch, *, max_failures: int) -> dict[str, Any]:
    monkeypatch.setattr(workers, "_fit", starts)
    group = GroupSettings(num_workers=1, device="cpu", max_failures=max_failures)
    return run_workers(environment_of_sums, None, group, open_folder(str(folder)))


def test_a_worker_lost_as_it_gets_its_work_is_a_failure_like_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_starts(Starts(lost=2), folder, monkeypatch, max_failures=2) == {"steps": 1}
    assert run_starts(Starts(lost=9), folder, monkeypatch, max_failures=-1) == {"steps": 1}
    starts = Starts(lost=9)
    with pytest.raises(UserError, match="failed more often than max_failures 2 allows"):
        run_starts(starts, folder, monkeypatch, max_failures=2)
    assert starts.number == 3
