"""Cycles of objects are looked for between steps, where something is due, and as before once a run is over."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.garbage import GarbageCollection
from pipeline.training.step import StepResult
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker
from tests.training.test_trainer import ALONE, CONFIG


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def test_cycles_go_where_collect_is_called_and_all_is_as_before_afterwards() -> None:
    old = Cycle()
    with GarbageCollection() as garbage:
        assert gc.isenabled(), "until the first call"
        garbage.collect()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        found = weakref.ref(Cycle())
        assert found() is not None
        garbage.collect()
        assert found() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0
    kept = weakref.ref(old)
    del old
    gc.collect()
    assert kept() is None, "what was exempted is looked at again"


def test_an_error_and_a_process_without_collection_are_left_as_they_were() -> None:
    with pytest.raises(UserError), GarbageCollection() as garbage:
        garbage.collect()
        raise UserError("the disk is full")
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    with GarbageCollection() as garbage:
        garbage.collect()
    assert not gc.isenabled()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_collects_where_something_is_due_and_never_within_a_step(
    fails: bool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, log_every=4, val_every=6, checkpoint_every=100, sample_every=100)
    trainer = Trainer(config, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    train_step, within, collections = trainer.train_step, [], []

    def watched(step: int) -> StepResult:
        within.append(gc.isenabled())
        if fails and step == 9:
            raise UserError("the disk is full")
        return train_step(step)

    class Counted(GarbageCollection):
        def collect(self) -> None:
            collections.append(len(within))
            super().collect()

    monkeypatch.setattr(trainer, "train_step", watched)
    monkeypatch.setattr("pipeline.training.trainer.GarbageCollection", Counted)
    if fails:
        with pytest.raises(UserError):
            trainer.run()
    else:
        trainer.run()
    assert within == [True] + [False] * (9 if fails else 11)
    assert collections == [1, 4, 6, 8] + ([] if fails else [12])
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_step_leaves_no_tensor_in_a_cycle(tiny_data: Path, tmp_path: Path) -> None:
    """It would keep its memory until the next collection."""
    trainer = Trainer(CONFIG, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    trainer.train_step(0)
    gc.collect()
    gc.disable()
    for step in range(1, 4):
        trainer.train_step(step)
    left = collected_objects()
    assert not [found for found in left if isinstance(found, torch.Tensor)]


def collected_objects() -> list[Any]:
    """What a collection finds that only cycles hold."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
