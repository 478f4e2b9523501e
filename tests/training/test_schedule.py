"""The learning rate of each step by --schedule, and resumes that would bend it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.optimizer import warmup_cosine
from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.training.optimizer import learning_rate
from pipeline.training.run_folder import finished_summary
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))
WSD: dict[str, Any] = {"schedule": "wsd", "warmup_steps": 2}
SEVENTHS = [1, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]


def config_with(**changes: Any) -> PretrainConfig:
    every = {"val_every": 100, "sample_every": 100, "checkpoint_every": 4, "keep_checkpoints": 9}
    return tiny_config(num_layers=1, lr=1e-2, **every, **changes)


def trainer(config: PretrainConfig, data: Path, output: Path) -> tuple[Trainer, MemoryTracker]:
    tracker = MemoryTracker()
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker), tracker


def train(config: PretrainConfig, data: Path, output: Path) -> dict[str, dict[int, float]]:
    """Losses and learning rates by step."""
    run, tracker = trainer(config, data, output)
    run.run()
    return {name: dict(tracker.metrics[f"train/{name}"]) for name in ("loss", "lr")}


def tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((output / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def require_equal(one: Path, other: Path, step: int) -> None:
    expected, found = tensors(one, step), tensors(other, step)
    assert expected and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def branch(source: Path, step: int, output: Path) -> Path:
    """A run folder with that checkpoint of another run alone."""
    shutil.copytree(source / "checkpoints" / f"step-{step:06d}", output / "checkpoints" / f"step-{step:06d}")
    return output


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        # 0.1 + 0.45 (1 + cos(k pi / 8)) for k from 0 to 8
        (
            {"warmup_steps": 2},
            [0.5, 1, 0.96574579, 0.86819805, 0.72220755, 0.55, 0.37779245, 0.23180195, 0.13425421, 0.1],
        ),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1]),
        ({"schedule": "linear", "warmup_fraction": 0.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({**WSD, "decay_fraction": 0.4}, [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]),
        ({**WSD, "decay_from": 7}, [0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
        ({**WSD}, [0.5, 1, 1, 1, 1, 1, 1, 1, 0.55, 0.1]),
        ({**WSD, "decay_fraction": 0.0}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "wsd", "warmup_fraction": 0.4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.55, 0.1]),
        ({"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.7, "min_lr_fraction": 0.0}, SEVENTHS),
    ],
)
def test_a_schedule_has_the_rates_computed_by_hand(changes: dict[str, Any], shares: list[float]) -> None:
    config = tiny_config(train_steps=10, lr=2e-3, **changes)
    found = [learning_rate(config, step) for step in range(10)]
    assert found == pytest.approx([2e-3 * share for share in shares], rel=1e-7, abs=1e-18)


def test_the_default_is_the_cosine_of_the_recipe_bit_for_bit() -> None:
    for step in (0, 1, 3999, 4000, 41_234, 79_998, 79_999, 90_000):
        expected = warmup_cosine(step, max_lr=18e-4, min_lr=18e-4 * 0.1, warmup_steps=4000, total_steps=80_000)
        assert learning_rate(PretrainConfig(), step) == expected


@pytest.mark.parametrize(
    "changes", [{"warmup_steps": 5}, {"schedule": "linear"}, {**WSD, "decay_fraction": 0.5}, {**WSD, "decay_from": 3}]
)
def test_a_run_that_stops_in_the_middle_goes_on_to_the_same_bits(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_with(train_steps=10, **changes)
    straight = train(config, tiny_data, tmp_path / "straight")
    stopped, _ = trainer(config, tiny_data, tmp_path / "stopped")
    for step in range(6):
        stopped.advance(step)
    stopped.writer.wait()
    resumed = train(config, tiny_data, tmp_path / "stopped")
    assert list(resumed["lr"]) == [5, 6, 7, 8, 9, 10]
    for name, values in resumed.items():
        assert values == {step: value for step, value in straight[name].items() if step > 4}
    require_equal(tmp_path / "straight", tmp_path / "stopped", 10)


@pytest.fixture
def half_done(tiny_data: Path, tmp_path: Path) -> Path:
    """A run with a cosine, stopped after 8 of 12 steps."""
    run, _ = trainer(config_with(), tiny_data, tmp_path / "run")
    for step in range(8):
        run.advance(step)
    run.writer.wait()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "found", "advice"),
    [
        # half a cosine in 23 steps in place of 11: 0.1 + 0.45 (1 + cos(7 pi / 11)) = 0.3631, and with 7 pi / 23 0.8095
        (
            {"train_steps": 24},
            "train_steps 12, now it is train_steps 24; that bends the learning rate: in step 8 of the 8 done it was "
            "0.3631 of --lr, and would have been 0.8095; ",
            "give --train_steps 12 as before, or start another run from its weights with --checkpoint and a new",
        ),
        (
            {"schedule": "linear"},
            "schedule cosine, now it is schedule linear; that bends",
            "give --schedule cosine as before, or",
        ),
        (
            {"warmup_fraction": None, "warmup_steps": 4},
            "warmup_fraction 0.05, warmup_steps None, now it is warmup_fraction None, warmup_steps 4; that bends",
            "in step 8 of the 8 done it was 0.3631 of --lr, and would have been 0.55; give --warmup_steps 1, or",
        ),
        (
            {"min_lr_fraction": 0.0},
            "min_lr_fraction 0.1, now it is min_lr_fraction 0.0; that bends",
            "_fraction 0.1 as",
        ),
    ],
)
def test_a_resume_that_would_bend_a_cosine_is_an_error(
    half_done: Path, tiny_data: Path, changes: dict[str, Any], found: str, advice: str
) -> None:
    config = dataclasses.replace(config_with(), **changes)
    for start in (
        lambda: trainer(config, tiny_data, half_done),
        lambda: finished_summary(config, data=tiny_data, output=half_done),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert f"checkpoints/step-000008 was trained with {found}" in str(caught.value)
        assert advice in str(caught.value)


def test_what_bends_nothing_goes_on(half_done: Path, tiny_data: Path) -> None:
    for changes in ({}, {"lr": 1e-3}, {"warmup_fraction": None, "warmup_steps": 1}, {"train_steps": 8}):
        config = dataclasses.replace(config_with(), **changes)
        assert trainer(config, tiny_data, half_done)[0].start_step == 8


def test_a_plateau_is_extended_and_decayed_in_two_branches(tiny_data: Path, tmp_path: Path) -> None:
    """Each branch has the bits of a run that had its settings from the start."""
    long = config_with(**WSD, decay_fraction=0.25)
    train(long, tiny_data, tmp_path / "long")

    early = dataclasses.replace(long, train_steps=7, decay_from=4, decay_fraction=None)
    late = dataclasses.replace(long, train_steps=10, decay_from=8, decay_fraction=None)
    extended = dataclasses.replace(long, train_steps=16)
    rates = {
        "early": (early, 4, [0.7, 0.4, 0.1]),
        "late": (late, 8, [0.55, 0.1]),
        "extended": (extended, 8, [1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]),
    }
    for name, (config, step, shares) in rates.items():
        output = branch(tmp_path / "long", step, tmp_path / name)
        metrics = train(config, tiny_data, output)
        expected = {step + 1 + index: 1e-2 * share for index, share in enumerate(shares)}
        assert metrics["lr"] == pytest.approx(expected, rel=1e-12)
        train(config, tiny_data, tmp_path / f"straight_{name}")
        require_equal(tmp_path / f"straight_{name}", output, config.train_steps)


def test_a_decay_that_has_begun_is_not_left_again(tiny_data: Path, tmp_path: Path) -> None:
    config = config_with(**WSD, decay_fraction=0.25)
    train(config, tiny_data, tmp_path)
    advice = "go on from a checkpoint of step {} or before, with --branch_from, --step and a new --output, or start"
    with pytest.raises(UserError, match=advice.format(9)):
        trainer(dataclasses.replace(config, train_steps=16), tiny_data, tmp_path)
    decayed = dataclasses.replace(config, train_steps=16, decay_fraction=None, decay_from=6)
    with pytest.raises(UserError, match=advice.format(6)):
        trainer(decayed, tiny_data, tmp_path)


def test_an_extended_plateau_keeps_its_warmup(tiny_data: Path, tmp_path: Path) -> None:
    config = config_with(schedule="wsd", warmup_fraction=0.25, decay_fraction=0.0)
    train(config, tiny_data, tmp_path)
    longer = dataclasses.replace(config, train_steps=16)
    with pytest.raises(UserError, match="give --warmup_steps 3 in place of --warmup_fraction, or"):
        trainer(longer, tiny_data, tmp_path)
    longer = dataclasses.replace(longer, warmup_fraction=None, warmup_steps=3)
    assert train(longer, tiny_data, tmp_path)["lr"] == dict.fromkeys(range(13, 17), 1e-2)
