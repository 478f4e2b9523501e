"""A sweep under a real Ray: a trial whose process is killed ends with the same bits, one that fails fails alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.cluster import ray_cluster
from pipeline.config.settings import to_dict
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.sweep import sweep_job
from pipeline.sweep.trials import plan_trials
from pipeline.tracking.journal import read_journal
from pipeline.tracking.run_history import RunHistory
from pipeline.training import launch
from tests.support.factories import tiny_config
from tests.support.holding import allow_holding, kill_in_training

STEPS = 120
KILL_AFTER = 10
HELD_AT = 25
"""The step before which the trial waits until it is killed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a local Ray of two logical CPUs."""
    path = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT25_HOME", str(path))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        allow_holding(patch)
        ray_cluster.connect(num_cpus=2)
        yield path
        ray_cluster.shut_down()


def flags(config: PretrainConfig) -> list[str]:
    """The flags of a config's settings that are not the default."""
    default = to_dict(PretrainConfig())
    return [f"--{name}={value}" for name, value in to_dict(config).items() if value != default[name]]


def losses(run_folder: Path) -> dict[str, dict[int, float]]:
    history = RunHistory.from_journal(read_journal(open_folder(run_folder)))
    return {name: history.metrics[name] for name in ("train/loss", "val/loss")}


def kill_trials(killed: list[int]) -> None:
    """Kill the process of the only trial, with its training on the way."""
    for process in psutil.Process().children(recursive=True):
        if "TrialProcess" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


def test_a_killed_trial_goes_on_and_a_failed_one_is_not_the_sweeps(folder: Path, tiny_data: Path) -> None:
    config = tiny_config(data=str(tiny_data), train_steps=STEPS, lr=5e-3, val_every=40, checkpoint_every=KILL_AFTER)
    sweep = SweepConfig(output="sweep", vary=("hellaswag=None,missing.jsonl",), trials_at_once=1)
    trials = plan_trials(sweep, [*flags(config), "--keep_every", str(KILL_AFTER)])
    killed: list[int] = []
    (folder / "sweep").mkdir()
    run_folder, kill = folder / "sweep/trial-000", functools.partial(kill_trials, killed)
    killer = kill_in_training(run_folder, kill, checkpoint=KILL_AFTER, held_at=HELD_AT)
    results, run = sweep_job.sweep(sweep, trials)
    killer.join(1200)
    assert len(killed) == 1
    assert [result.status for result in results] == ["finished", "failed"]
    assert "missing.jsonl" in results[1].error
    starts = [
        line for line in (folder / "sweep/trial-000/tracking.jsonl").read_text().splitlines() if '"start"' in line
    ]
    assert len(starts) == 2, "the trial had two lives"

    launch.pretrain(tiny_config(**{**to_dict(trials[0].config), "output": "clean", "tracking_uri": None}))
    assert losses(folder / "sweep/trial-000") == losses(folder / "clean")
    assert results[0].val_loss == losses(folder / "clean")["val/loss"][STEPS]

    client = MlflowClient(run.tracking_uri)
    children = client.search_runs([run.experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    found = {child.info.run_name: child.info.status for child in children}
    assert found == {"pretrain trial-000": "FINISHED", "pretrain trial-001": "FAILED"} and len(children) == 2
    parent = client.get_run(run.run_id)
    assert parent.info.status == "FINISHED" and parent.data.tags["best_trial"] == "trial-000"
    assert parent.data.metrics["sweep/best_val_loss"] == results[0].val_loss
    assert {file.path for file in client.list_artifacts(run.run_id)} >= {"report.html", "curves.png", "results.csv"}

    written = (folder / "sweep/trial-000/summary.json").stat().st_mtime_ns
    again, same = sweep_job.sweep(sweep, trials)
    assert [result.status for result in again] == ["finished", "failed"] and same.run_id == run.run_id
    assert (folder / "sweep/trial-000/summary.json").stat().st_mtime_ns == written, "a finished trial stays"


def test_a_rule_ends_a_trial_with_a_checkpoint(folder: Path, tiny_data: Path) -> None:
    # The rule compares val losses of the same step; a learning rate of 0 changes no weight, so it is the worse one.
    config = tiny_config(data=str(tiny_data), train_steps=3000, val_every=20, checkpoint_every=1000, log_every=20)
    sweep = SweepConfig(output="early", vary=("lr=5e-3,0",), trials_at_once=1, early_stopping="asha", min_steps=20)
    trials = plan_trials(sweep, [*flags(config), "--train_steps=60"])[:1]
    trials += plan_trials(sweep, flags(config))[1:]
    results, _ = sweep_job.sweep(sweep, trials)
    assert [result.status for result in results] == ["finished", "stopped early"]
    stopped = json.loads((folder / "early/results.json").read_text())[1]
    assert 20 <= stopped["steps"] < 3000 and stopped["val_loss"] > results[0].best_val_loss
    assert len(list((folder / "early/trial-001/checkpoints").iterdir())) == 1, "the one of its early end"
    assert not [*(folder / "early/trial-001").glob("stop-*"), *(folder / "early/trial-001").glob("error-*")]
    again, _ = sweep_job.sweep(sweep, trials)
    assert again == results, "it is not trained again"


def test_what_cannot_be_trained_is_an_error(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(data=str(tiny_data), train_steps=2)
    sweep = SweepConfig(output="nothing", vary=("lr=1e-3",))
    with pytest.raises(UserError, match=r"trial-000 \(lr 1e-3\): .*does not exist"):
        sweep_job.sweep(sweep, plan_trials(sweep, [*flags(config), f"--data={tmp_path}/nowhere"]))
    with pytest.raises(UserError, match="3 workers need 3 CPUs, but the cluster has 2"):
        sweep_job.sweep(sweep, plan_trials(sweep, [*flags(config), "--num_workers=3", "--tokens_per_step=96"]))
    bad = SweepConfig(output="bad", vary=("lr=1e-3",))
    with pytest.raises(UserError, match=r"no trial of the sweep gave a result; trial-000 failed: .*missing\.jsonl"):
        sweep_job.sweep(bad, plan_trials(bad, [*flags(config), "--hellaswag=missing.jsonl"]))
