"""Back to an older checkpoint, in the run's folder or as a branch: what journal, MLflow, report, best.json say then."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking import mlflow_tracker
from pipeline.tracking.journal import read_journal
from pipeline.tracking.mlflow_run import current_run, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.run_history import RunHistory
from pipeline.tracking.tracker import Trackers
from pipeline.training import run_folder
from pipeline.training.launch import begin_branch
from pipeline.training.run_folder import Best, finished_summary, read_best, write_best
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE

CONFIG = tiny_config(
    schedule="wsd",
    decay_fraction=0.0,
    warmup_steps=0,
    lr=3e-2,
    val_every=3,
    sample_every=100,
    checkpoint_every=3,
    keep_checkpoints=9,
)

Curve = dict[int, float]


class Bench:
    """Runs in one folder with one store of MLflow, trained in this process by the real trainer."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home, self.data, self.client = home, data, MlflowClient(f"sqlite:///{home}/mlflow.db")

    def train(self, name: str, config: PretrainConfig = CONFIG, *, killed_after: int | None = None) -> Curve:
        """Train as jobs/pretrain.py does; returns the losses of the steps that this process has done."""
        data, output = open_folder(self.data), open_folder(self.home / name)
        config = replace(config, output=str(output))
        begin_branch(config, data=data, output=output)
        run = open_run(
            tracking_uri=f"sqlite:///{self.home}/mlflow.db",
            experiment="exp",
            folder=output,
            working_folder=self.home,
            job="pretrain",
        )
        memory, tracker = MemoryTracker(), MLflowTracker(run, output, registered_model="gpt")
        trainer = Trainer(config, data=data, output=output, workers=ALONE, tracker=Trackers(tracker, memory))
        if killed_after is None:
            trainer.run()
        else:
            trainer._announce()
            for step in range(trainer.start_step, killed_after):
                trainer.advance(step)
            trainer.writer.wait()
            tracker.uploader.stop()
            tracker.uploader._thread.join(60)
            tracker.journal.close()
        return dict(memory.metrics["train/loss"])

    def run_id(self, name: str) -> str:
        """The run of MLflow that the folder names now."""
        return str(json.loads((self.home / name / "mlflow_run.json").read_text())["run_id"])

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.client.get_run(run_id).data.tags)

    def curve(self, run_id: str, metric: str = "train/loss") -> list[tuple[int, float]]:
        """Every point that MLflow has, doubled ones too."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    def journal(self, name: str) -> RunHistory:
        return RunHistory.from_journal(read_journal(open_folder(self.home / name)))

    def remove(self, name: str, *steps: int) -> None:
        """Go back: remove checkpoints, as a user does."""
        for step in steps:
            shutil.rmtree(self.home / name / f"checkpoints/step-{step:06d}")

    def best(self, name: str) -> Best:
        best = read_best(open_folder(self.home / name))
        assert best is not None and (self.home / name / f"checkpoints/step-{best.step:06d}").is_dir()
        return best


@pytest.fixture
def bench(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(mlflow_tracker, "_PERIOD_SECONDS", 0.1)
    return Bench(tmp_path, tiny_data)


def until(curve: Curve, step: int) -> Curve:
    return {each: loss for each, loss in curve.items() if each <= step}


def test_the_same_steps_again_are_the_same_points_of_the_same_run(bench: Bench) -> None:
    first = bench.train("run")
    run_id = bench.run_id("run")
    bench.remove("run", 9, 12)
    again = bench.train("run")
    assert again == {step: loss for step, loss in first.items() if step > 6}
    assert bench.run_id("run") == run_id
    assert bench.curve(run_id) == sorted(first.items()) and bench.journal("run").metrics["train/loss"] == first
    assert "abandoned_after_step" not in bench.tags(run_id)


def test_steps_with_another_rate_are_told_anew_and_marked(bench: Bench) -> None:
    first = bench.train("run")
    before = bench.run_id("run")
    bench.remove("run", 6, 9, 12)
    write_best(open_folder(bench.home / "run"), Best(step=9, val_loss=0.0))  # what the first run would find good
    second = bench.train("run", replace(CONFIG, lr=1e-5))
    now, told = bench.run_id("run"), until(first, 3) | second
    assert sorted(second) == [*range(4, 13)] and second[5] != first[5]
    assert bench.curve(now) == sorted(told.items()) and bench.journal("run").metrics["train/loss"] == told
    assert [step for step, _ in bench.curve(now, "val/loss")] == [3, 6, 9, 12]
    assert bench.curve(before) == sorted(first.items()), "what was trained first stays what it was"
    old, new = bench.tags(before), bench.tags(now)
    assert (old["abandoned_after_step"], old["continued_as"]) == ("3", now)
    assert (new["branched_from"], new["branched_at_step"]) == (before, "3")
    assert {bench.client.get_run(run_id).info.status for run_id in (before, now)} == {"FINISHED"}
    assert new["resumed.lr"] == "1e-05" and bench.client.get_run(now).data.params["lr"] == "0.03"
    assert "went back" in (bench.home / "run/report.html").read_text()
    best = bench.best("run")
    assert best.val_loss == dict(bench.curve(now, "val/loss"))[best.step]
    version = bench.client.get_model_version_by_alias("gpt", "best")
    assert (version.run_id, version.tags["step"]) == (now, str(best.step))
    abandoned = {v.tags["step"] for v in bench.client.search_model_versions("name = 'gpt'") if "abandoned" in v.tags}
    assert abandoned <= {"6", "9", "12"}


def test_the_end_that_was_given_up_is_told_no_more(bench: Bench) -> None:
    bench.train("run")
    names = ("report.html", "curves.png", "summary.json")
    assert all((bench.home / "run" / name).exists() for name in names)
    bench.remove("run", 6, 9, 12)
    bench.train("run", replace(CONFIG, grad_clip=0.5), killed_after=5)
    assert not any((bench.home / "run" / name).exists() for name in names)


def test_a_branch_has_the_bits_of_a_run_that_went_back(bench: Bench) -> None:
    changed = replace(CONFIG, lr=1e-3)
    parent = bench.train("parent", killed_after=9)
    branch = bench.train("branch", replace(changed, branch_from=str(bench.home / "parent"), step=3), killed_after=7)
    bench.remove("parent", 6, 9)
    assert bench.train("parent", changed, killed_after=7) == branch and sorted(branch) == [4, 5, 6, 7]
    again = bench.train("branch", replace(changed, branch_from=str(bench.home / "parent"), step=3))
    assert again[7] == branch[7] and sorted(again) == [*range(7, 13)], "the same command goes on"
    assert bench.curve(bench.run_id("branch")) == sorted((branch | again).items())
    record = json.loads((bench.home / "branch/run.json").read_text())["parent"]
    assert (record["folder"], record["step"]) == (str(bench.home / "parent"), 3)
    tags = bench.tags(bench.run_id("branch"))
    assert (tags["branched_from"], tags["branched_at_step"]) == (record["run_id"], "3")
    assert tags["mlflow.parentRunId"] == record["run_id"] and sorted(parent) == [*range(1, 10)]
    assert "branch of" in (bench.home / "branch/report.html").read_text()


def test_a_branch_that_decays_is_a_run_that_had_its_settings_from_the_start(bench: Bench) -> None:
    decaying = replace(CONFIG, decay_fraction=None, decay_from=6, train_steps=10)
    whole = bench.train("whole", decaying)
    bench.train("plateau", killed_after=9)
    branch = bench.train("branch", replace(decaying, branch_from=str(bench.home / "plateau"), step=6))
    assert branch == {step: loss for step, loss in whole.items() if step > 6}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": 5}, r"has no checkpoint of step 5; the steps with one: 3, 6"),
        ({"step": None}, r"a branch needs both"),
        ({"step": 12}, r"must begin between 1 and the last step"),
        ({"step": 3, "checkpoint": "x"}, r"begins from one of them"),
        ({"step": 3, "d_model": 64}, r"with d_model 32, but this run asks for 64"),
        ({"step": 3, "output": "run"}, r"is a run of its own; give another --output"),
    ],
)
def test_a_branch_that_cannot_be_is_one_sentence(bench: Bench, changes: dict[str, Any], sentence: str) -> None:
    bench.train("run", killed_after=6)
    name = changes.pop("output", "branch")
    with pytest.raises(UserError, match=sentence):
        bench.train(name, replace(CONFIG, branch_from=str(bench.home / "run"), **changes))
    assert name == "run" or not (bench.home / name / "checkpoints").exists()


def test_a_best_checkpoint_that_is_gone_is_followed_by_the_best_of_the_others(bench: Bench) -> None:
    bench.train("run", killed_after=9)
    losses = {3: 1.0, 6: 3.0, 9: 2.0}  # as if they had been measured
    path = bench.home / "run/tracking.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "checkpoint" and "val_loss" in line["values"]:
            line["values"]["val_loss"] = losses[line["step"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (bench.home / "run/tracking_sent.json").unlink()
    write_best(open_folder(bench.home / "run"), Best(step=3, val_loss=1.0))
    bench.remove("run", 3)
    bench.train("run", replace(CONFIG, val_every=0), killed_after=9)
    config = replace(CONFIG, output=str(bench.home / "run"), train_steps=9, val_every=0)
    Trainer(
        config, data=bench.data, output=bench.home / "run", workers=ALONE, tracker=MemoryTracker()
    ).evaluation.mend_best(open_folder(bench.home / "run/checkpoints"))
    assert bench.best("run") == Best(step=9, val_loss=2.0)


def test_the_summary_of_a_finished_run_names_no_checkpoint_that_is_gone(bench: Bench) -> None:
    bench.train("run")
    best = bench.best("run").step
    if best == 12:  # the newest is needed to be finished
        write_best(open_folder(bench.home / "run"), Best(step=6, val_loss=0.0))
        best = 6
    bench.remove("run", best)
    config = replace(CONFIG, output=str(bench.home / "run"))
    summary = finished_summary(config, data=bench.data, output=bench.home / "run")
    assert summary is not None and summary.best_step not in (None, best)


def test_a_copied_folder_is_a_run_of_its_own(bench: Bench) -> None:
    first = bench.train("run", killed_after=6)
    shutil.copytree(bench.home / "run", bench.home / "copy")
    copied = bench.train("copy", replace(CONFIG, lr=1e-3))
    first |= bench.train("run")
    assert bench.run_id("copy") != bench.run_id("run")
    assert bench.curve(bench.run_id("run")) == sorted(first.items())
    assert bench.curve(bench.run_id("copy")) == sorted((until(first, 6) | copied).items())
    assert bench.tags(bench.run_id("copy"))["branched_from"] == bench.run_id("run")
    models = bench.client.search_logged_models(
        [bench.client.get_run(bench.run_id("copy")).info.experiment_id],
        filter_string=f"source_run_id = '{bench.run_id('copy')}'",
    )
    assert {Path(model.tags["checkpoint"]).parent.parent.name for model in models} == {"copy"}


def test_a_moved_folder_is_the_same_run(bench: Bench) -> None:
    first = bench.train("run", killed_after=6)
    run_id = bench.run_id("run")
    (bench.home / "run").rename(bench.home / "moved")
    first |= bench.train("moved")
    assert bench.run_id("moved") == run_id and bench.curve(run_id) == sorted(first.items())


def test_every_setting_decides_a_step_or_is_named_as_one_that_does_not() -> None:
    names = {field.name for field in fields(PretrainConfig)}
    named = run_folder._NOT_IN_A_STEP | run_folder._OF_THE_START
    assert named <= names
    assert names - named == {
        *("num_layers", "num_heads", "d_model", "d_ff", "context_length", "theta", "norm_eps", "tie_embeddings"),
        *("qk_norm", "tokens_per_step", "optimizer", "embedding_lr", "output_lr", "vector_lr", "beta1", "beta2"),
        *("eps", "weight_decay", "embedding_weight_decay", "muon_momentum", "muon_iterations", "muon_coefficients"),
        *("grad_clip", "seed", "precision", "packing", "document_mask"),
    }


@pytest.mark.slow
def test_every_curve_is_what_was_trained_after_anything_that_a_user_does(bench: Bench) -> None:
    low = replace(CONFIG, lr=1e-3)
    told = bench.train("run", killed_after=8)
    told |= bench.train("run", killed_after=10)  # redoes 7 and 8, bit for bit
    first = bench.run_id("run")
    bench.remove("run", 6, 9)
    redone = bench.train("run", low, killed_after=7)
    kept = until(told, 3) | redone
    bench.remove("run", bench.best("run").step) if bench.best("run").step == 3 else None
    kept |= bench.train("run", replace(low, train_steps=15))  # extended
    assert bench.curve(first) == sorted(told.items())
    assert bench.curve(bench.run_id("run")) == sorted(kept.items())
    branch = bench.train("branch", replace(low, lr=1e-2, branch_from=str(bench.home / "run"), step=9))
    assert bench.curve(bench.run_id("branch")) == sorted(branch.items()) and sorted(branch) == [10, 11, 12]
    bench.remove("run", 15)
    other = bench.train("run", replace(low, lr=1e-4, train_steps=15))
    last = until(kept, 12) | other
    assert bench.curve(bench.run_id("run")) == sorted(last.items())
    assert bench.journal("run").metrics["train/loss"] == last
    assert bench.journal("branch").metrics["train/loss"] == branch
    assert bench.best("run").step in (3, 6, 9, 12, 15)
    assert len({first, bench.run_id("run"), bench.run_id("branch")}) == 3
    assert (
        current_run(
            open_folder(bench.home / "run"),
            open_run(
                tracking_uri=f"sqlite:///{bench.home}/mlflow.db",
                experiment="exp",
                folder=open_folder(bench.home / "run"),
                working_folder=bench.home,
                job="pretrain",
            ),
        ).rollbacks
        == 2
    )
