"""Tasks during training: asked when they are due, by all ranks together, and without a trace in the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.pretrained import resolve
from pipeline.run_files import TASKS_FILE
from pipeline.storage.folders import open_folder
from pipeline.tasks.catalog import read_tasks
from pipeline.tasks.questions import store_tasks, stored_tasks
from pipeline.tasks.results import all_figures, core_mean
from pipeline.tasks.scoring import score_tasks
from pipeline.training.run_folder import RunSummary
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE
from tests.support.ranks import run_ranks
from tests.support.task_files import write_bundle, write_harness

LAST = "checkpoints/step-000012"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    files = write_bundle(tmp_path_factory.mktemp("bundle") / "eval_bundle", 8)
    write_harness(files, ["piqa"], 8)
    return tiny_config(tasks="core,piqa", task_files=str(files), tasks_every=5, tokens_per_step=32 * 12, batch_size=4)


def train(config: PretrainConfig, data: Path, output: Path) -> tuple[RunSummary, MemoryTracker]:
    open_folder(output).make()
    if config.tasks:
        store_tasks(read_tasks(config), open_folder(output), TASKS_FILE)
    tracker = MemoryTracker()
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker).run(), tracker


def figures(checkpoint: Path, config: PretrainConfig) -> dict[str, float]:
    found = resolve.open_model(checkpoint, torch.device("cpu"))
    results = score_tasks(found.model, found.tokenizer, read_tasks(config), ALONE, tokens_per_batch=500)
    core = core_mean(results)
    assert core is not None and core[1] is not None
    return {"core": core[0], "core_stderr": core[1]} | all_figures(results)


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / LAST).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_tasks_are_asked_when_due_and_training_is_the_same_without(
    config: PretrainConfig, tiny_data: Path, tmp_path: Path
) -> None:
    summary, asked = train(config, tiny_data, tmp_path / "asked")
    plain_config = dataclasses.replace(config, tasks=None, task_files=None)
    _, plain = train(plain_config, tiny_data, tmp_path / "plain")
    assert [step for step, _ in asked.metrics["eval/core"]] == [5, 10, 12]
    assert asked.metrics["train/loss"] == plain.metrics["train/loss"], "not one bit differs"
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "asked")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    again = figures(tmp_path / "asked" / LAST, config)
    assert summary.task_scores == pytest.approx(again, rel=1e-5)
    assert {name for name in asked.metrics if name.startswith("eval/")} == {
        "eval/core",
        *(f"eval/core_{label}_{kind}" for label in ("choices", "blanks", "words") for kind in ("acc", "centered")),
        *(f"eval/core_{label}_bits_per_byte" for label in ("choices", "blanks", "words")),
        *(f"eval/piqa_{kind}" for kind in ("acc", "acc_norm", "bits_per_byte")),
    }
    assert not [name for name in plain.metrics if name.startswith("eval/")]


def test_tasks_are_the_same_after_they_were_stored(config: PretrainConfig, tmp_path: Path) -> None:
    folder, tasks = open_folder(tmp_path), read_tasks(config)
    store_tasks(tasks, folder, "tasks.json")
    assert stored_tasks(folder, "tasks.json") == tasks
    with pytest.raises(UserError, match=r"absent\.json, the tasks to score, is missing"):
        stored_tasks(folder, "absent.json")


@pytest.mark.slow
def test_three_ranks_share_the_questions(config: PretrainConfig, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "three"
    output.mkdir()
    store_tasks(read_tasks(config), open_folder(output), TASKS_FILE)
    values = dataclasses.asdict(dataclasses.replace(config, output=str(output)))
    settings: dict[str, Any] = {"config": values, "data": [str(tiny_data)], "stop_after": None}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings | {"history": str(tmp_path / "history.json")}))
    result = run_ranks("trainer_process.py", file, world_size=3)
    assert result.returncode == 0, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["task_scores"] == pytest.approx(figures(output / LAST, config), rel=1e-5)
