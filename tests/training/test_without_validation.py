"""Training without a val set: said before the first step, or not asked for (--val_every 0)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.tracking import report
from pipeline.training.run_folder import finished_summary, read_best
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE


def without(data: Path, folder: Path, split: str) -> Path:
    """A copy of a data folder whose manifest has no shard of a split."""
    shutil.copytree(data, folder)
    manifest = Manifest.load(folder)
    left = tuple(entry for entry in manifest.shards if entry.split != split)
    dataclasses.replace(manifest, shards=left).save(folder)
    return folder


def test_nothing_to_validate_on_is_said_at_the_start(tiny_data: Path, tmp_path: Path) -> None:
    data = without(tiny_data, tmp_path / "data", "val")
    sentence = "has nothing to validate on: no document is held out; give --val_every 0 to train without, or"
    with pytest.raises(UserError, match=sentence):
        finished_summary(tiny_config(), data=data, output=tmp_path / "run")  # what the driver asks before Ray starts
    with pytest.raises(UserError, match=sentence):
        Trainer(tiny_config(), data=data, output=tmp_path / "run", workers=ALONE, tracker=MemoryTracker())
    data = without(tiny_data, tmp_path / "no train", "train")
    with pytest.raises(UserError, match="has nothing to train on: all its documents are held out"):
        finished_summary(tiny_config(val_every=0), data=data, output=tmp_path / "run")


def test_training_without_validation_is_the_same_training(tiny_data: Path, tmp_path: Path) -> None:
    trackers = {}
    for name, val_every, data in (
        ("with", 4, tiny_data),
        ("without", 0, without(tiny_data, tmp_path / "data", "val")),
    ):
        trackers[name] = MemoryTracker()
        config = tiny_config(val_every=val_every, checkpoint_every=6)
        trainer = Trainer(config, data=data, output=tmp_path / name, workers=ALONE, tracker=trackers[name])
        summary = trainer.run()
    assert trackers["with"].metrics["train/loss"] == trackers["without"].metrics["train/loss"]
    assert "val/loss" not in trackers["without"].metrics
    assert (summary.val_loss, summary.val_tokens, summary.perplexity, summary.best_step) == (None, 0, None, None)
    assert read_best(open_folder(tmp_path / "without")) is None
    found = finished_summary(config, data=data, output=tmp_path / "without")
    assert found == summary and json.loads((tmp_path / "without/summary.json").read_text())["val_loss"] is None
    rows = dict(report._result(json.loads((tmp_path / "without/summary.json").read_text()), {}))
    assert "val loss" not in rows and "train loss" in rows


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(UserError, match="val_every is -1; it must not be negative"):
        tiny_config(val_every=-1)
