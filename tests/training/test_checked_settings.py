"""Settings and data that do not go together are found before workers start; odd ones that have a meaning train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.evaluation.validation import perplexity, perplexity_text
from pipeline.storage.folders import open_folder
from pipeline.tracking.journal import read_journal
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.run_history import RunHistory
from pipeline.training import launch
from pipeline.training.run_folder import RunSummary, changed_settings, finished_summary, require_own
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


def train(data: Path, output: Path, tracker: Any = None, **changes: Any) -> RunSummary:
    config = tiny_config(**changes)
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker or MemoryTracker()).run()


def sentence(data: Path, output: Path, **changes: Any) -> str:
    """What a job says of these settings before it starts anything."""
    with pytest.raises(UserError) as error:
        finished_summary(tiny_config(**changes), data=data, output=output)
    return str(error.value)


def test_without_clipping_gradients_stay_as_they_are(tiny_data: Path, tmp_path: Path) -> None:
    histories = []
    for clip in (0.0, math.inf, 1e-3):
        tracker = MemoryTracker()
        train(tiny_data, tmp_path / str(clip), tracker, grad_clip=clip, lr=1e-2)
        histories.append(tracker.metrics["train/loss"])
    assert histories[0] == histories[1] != histories[2]


def test_a_sample_prompt_longer_than_the_context(tiny_data: Path, tmp_path: Path) -> None:
    found = sentence(tiny_data, tmp_path, context_length=4, tokens_per_step=64)
    assert found.startswith("--sample_prompt has ") and "but the network sees 4 at once; shorten it" in found
    text = "a b " * 8
    summary = finished_summary(tiny_config(sample_prompt=text), data=tiny_data, output=tmp_path)
    assert summary is None, f"{len(text)} bytes are fewer tokens"


def test_less_text_than_a_window(tiny_data: Path, tmp_path: Path) -> None:
    found = sentence(tiny_data, tmp_path, context_length=10**7, tokens_per_step=10**7)
    assert "tokens to train on, fewer than one window of context_length 10,000,000 + 1 tokens" in found


def test_a_checkpoint_beyond_train_steps_and_one_of_another_optimizer(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path, train_steps=12, schedule="wsd", warmup_steps=2, decay_from=12)
    found = sentence(tiny_data, tmp_path, train_steps=6)
    assert "is beyond --train_steps 6: 12 steps are done; give --train_steps 12 or more, or another --output" in found
    found = sentence(tiny_data, tmp_path, train_steps=12, optimizer="muon")
    assert "was trained with optimizer adamw, now it is muon" in found and "give --optimizer adamw" in found
    again = tiny_config(train_steps=12, schedule="wsd", warmup_steps=2, decay_from=12)
    assert finished_summary(again, data=tiny_data, output=tmp_path) is not None


def test_settings_that_are_not_those_of_the_newest_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    output = open_folder(tmp_path)
    assert changed_settings(tiny_config(), output) == "", "nothing was trained"
    train(tiny_data, tmp_path, train_steps=2)
    same = {"train_steps": 2, "data": "elsewhere/data", "batch_size": "auto", "tracking_uri": "http://other"}
    assert changed_settings(tiny_config(**same), output) == ""
    lr = tiny_config().lr
    changed = tiny_config(train_steps=2, lr=7 * lr, val_every=99)
    assert changed_settings(changed, output) == (
        f"lr {7 * lr} instead of {lr}, val_every 99 instead of {tiny_config().val_every}"
    )


@pytest.mark.parametrize("name", ["report.html", "curves.png"])
def test_a_file_of_somebody_in_a_new_run_folder(tiny_data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    config = tiny_config(data=str(tiny_data), output=str(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/m.db")
    with pytest.raises(UserError, match=rf"holds a {name} and no run, which would replace it; choose another --output"):
        launch.pretrain(config)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "precious"
    (tmp_path / "tracking.jsonl").touch()
    require_own(open_folder(tmp_path))


def test_a_perplexity_that_is_no_float_is_infinite_and_the_run_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """A rate of 18 in place of 18e-4; MLflow, journal and report take what comes of it, after a restart, too."""
    uri, output = f"sqlite:///{tmp_path}/mlflow.db", open_folder(tmp_path / "run")
    output.make()
    folder: dict[str, Any] = {
        "tracking_uri": uri,
        "experiment": "e",
        "folder": output,
        "working_folder": tmp_path,
        "job": "pretrain",
    }
    settings: dict[str, Any] = {"lr": 18.0, "val_every": 2, "checkpoint_every": 2, "train_steps": 6}
    settings |= {"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.0}
    for steps in (4, 6):
        run = open_run(**folder)
        tracker = MLflowTracker(run, output, sample_system=False)
        summary = train(tiny_data, tmp_path / "run", tracker, **{**settings, "train_steps": steps})
    assert summary.steps == 6 and summary.val_loss is not None and summary.val_loss > 710
    assert summary.perplexity == math.inf
    history = RunHistory.from_journal(read_journal(output))
    losses, perplexities = history.metrics["val/loss"], history.metrics["val/perplexity"]
    assert list(losses) == list(perplexities) == [2, 4, 6]
    assert all(perplexities[step] == perplexity(loss) for step, loss in losses.items())
    points = MlflowClient(uri).get_metric_history(run.run_id, "val/loss")
    assert [(point.step, point.value) for point in points] == list(losses.items())
    assert [point.step for point in MlflowClient(uri).get_metric_history(run.run_id, "val/perplexity")] == [2, 4, 6]
    assert MlflowClient(uri).get_run(run.run_id).info.status == "FINISHED"
    assert (tmp_path / "run" / "report.html").is_file()


def test_perplexities_in_lines_of_text() -> None:
    assert perplexity(709.0) == math.exp(709.0) and perplexity(710.0) == math.inf
    assert [perplexity_text(loss) for loss in (3.2813, 100.0, 710.0)] == ["26.61", "2.7e+43", "inf"]
