"""A run that is asked to end in a long step: the step is abandoned, and the run later has the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import Interruptions
from pipeline.errors import RunStopped
from pipeline.training import step_guard
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker

MICRO_BATCHES = 6
CONFIG = tiny_config(tokens_per_step=32 * 2 * MICRO_BATCHES, train_steps=4, val_every=0, sample_every=9)
ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


def trainer(config: PretrainConfig, data: Path, output: Path, *, stop_at_question: int = 10**9) -> Trainer:
    """A trainer that is asked to end when it looks for that for the n-th time: after micro-batches and steps."""
    asked = iter(range(1, 10**9))
    interruptions = Interruptions(stop_requested=lambda: next(asked) >= stop_at_question)
    return Trainer(
        config, data=data, output=output, workers=ALONE, tracker=MemoryTracker(), interruptions=interruptions
    )


def tensors(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run_folder / f"checkpoints/step-{step:06d}").glob("*.safetensors")
    return load_file(file)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is short enough to be finished."""
    monkeypatch.setattr(step_guard, "PATIENCE_SECONDS", -1.0)


@pytest.mark.usefixtures("impatient")
def test_a_step_that_is_abandoned_leaves_nothing_and_is_done_again(tiny_data: Path, tmp_path: Path) -> None:
    trainer(CONFIG, tiny_data, tmp_path / "straight").run()
    with pytest.raises(RunStopped, match="stopped at step 2 of 4"):
        trainer(CONFIG, tiny_data, tmp_path / "stopped", stop_at_question=2 * MICRO_BATCHES + 3).run()
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-000002"]
    trainer(CONFIG, tiny_data, tmp_path / "stopped").run()
    expected, found = tensors(tmp_path / "straight", 4), tensors(tmp_path / "stopped", 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("impatient")
def test_before_the_first_step_there_is_nothing_to_save(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="stopped at step 0 of 4"):
        trainer(CONFIG, tiny_data, tmp_path, stop_at_question=1).run()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_step_that_is_nearly_done_is_finished(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="stopped at step 3 of 4"):
        trainer(CONFIG, tiny_data, tmp_path, stop_at_question=2 * MICRO_BATCHES + 3).run()
