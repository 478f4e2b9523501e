"""When the loop saves, and what it does when a save fails: before evaluation, and known at the next step."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.errors import UserError
from pipeline.evaluation import validation
from pipeline.training import periodic_evaluation
from pipeline.training.trainer import Trainer
from tests.checkpoints.test_writer import steps_in
from tests.support.memory_tracker import MemoryTracker
from tests.training.test_trainer import ALONE, CONFIG, train_here


def make_trainer(data: Path, output: Path, **changes: object) -> Trainer:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=MemoryTracker())


def test_a_step_is_saved_before_it_is_evaluated(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that dies, of memory for instance, costs nothing of the training."""
    trainer = make_trainer(tiny_data, tmp_path, checkpoint_every=3, val_every=3)
    step = trainer.advance(trainer.advance(0))

    def too_large(*_: object, **__: object) -> validation.ValidationResult:
        raise MemoryError

    monkeypatch.setattr(periodic_evaluation, "validation_loss", too_large)
    with pytest.raises(MemoryError):
        trainer.advance(step)
    trainer.writer.wait()
    assert steps_in(tmp_path / "checkpoints") == [3]
    checkpoint_reader.verify(tmp_path / "checkpoints" / "step-000003")


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_data, tmp_path, checkpoint_every=2)
    step = trainer.advance(trainer.advance(0))
    trainer.writer.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    step = trainer.advance(trainer.advance(step))
    assert trainer.writer._pending is not None
    trainer.writer._pending.exception(60)
    with pytest.raises(UserError, match=r"the disk of .*step-000004\.incomplete is full"):
        trainer.advance(step)
    assert steps_in(tmp_path / "checkpoints") == [2]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tiny_data: Path, tmp_path: Path) -> None:
    clean, expected = train_here(CONFIG, tiny_data, tmp_path / "clean")
    broken = make_trainer(tiny_data, tmp_path / "broken")
    step = 0
    while step < 11:
        step = broken.advance(step)
    broken.writer.wait()
    (file,) = (tmp_path / "broken" / "checkpoints" / "step-000010").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    summary, tracker = train_here(CONFIG, tiny_data, tmp_path / "broken")
    assert tracker.metrics["train/loss"] == expected.metrics["train/loss"][5:], "from step 5 on, bit for bit"
    assert (summary.last_loss, summary.val_loss) == (clean.last_loss, clean.val_loss)


def test_the_best_and_every_nth_checkpoint_stay(tiny_data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every=2, val_every=2, keep_checkpoints=1, keep_every=4)
    trainer = Trainer(config, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    trainer.run()
    assert trainer.evaluation.best is not None
    expected = {4, 8, 12} | {trainer.evaluation.best.step}
    assert expected <= set(steps_in(tmp_path / "checkpoints"))
    assert not {2, 6} & (set(steps_in(tmp_path / "checkpoints")) - expected)


def test_how_long_training_stood_still_is_told(tiny_data: Path, tmp_path: Path) -> None:
    _, tracker = train_here(CONFIG, tiny_data, tmp_path)
    points = tracker.metrics["perf/checkpoint_stall_seconds"]
    assert [step for step, _ in points] == [5, 10, 12] and all(seconds > 0 for _, seconds in points)


def test_steps_kept_for_good_fit_the_steps_that_are_saved() -> None:
    with pytest.raises(UserError, match="keep_every is 7; it must be a multiple of checkpoint_every 5"):
        dataclasses.replace(CONFIG, keep_every=7)
