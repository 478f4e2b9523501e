"""Evaluation during training: HellaSwag on one rank and on three, the best checkpoint, the same training without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.evaluation import hellaswag
from pipeline.evaluation.validation import ValidationResult
from pipeline.pretrained import resolve
from pipeline.storage.folders import open_folder
from pipeline.training import periodic_evaluation
from pipeline.training.run_folder import RunSummary, read_best
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.hellaswag_questions import make_questions, write_questions
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE
from tests.support.ranks import run_ranks
from tests.support.s3_server import S3

CONFIG = tiny_config(
    d_ff=96,
    tokens_per_step=32 * 12,
    batch_size=4,
    lr=1e-2,
    val_every=2,
    sample_every=6,
    hellaswag_every=5,
    checkpoint_every=3,
)
NUM_QUESTIONS = 40


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "hellaswag_val.jsonl", NUM_QUESTIONS)


def train(config: PretrainConfig, data: Path, output: Path) -> tuple[RunSummary, MemoryTracker]:
    tracker = MemoryTracker()
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker).run(), tracker


def score(checkpoint: Path, questions: Path) -> hellaswag.HellaSwagResult:
    found = resolve.open_model(checkpoint, torch.device("cpu"))
    encoded = hellaswag.encode_all(hellaswag.read_questions(questions), found.tokenizer)
    return hellaswag.score(found.model, encoded, ALONE, tokens_per_batch=500)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_hellaswag_is_asked_when_due_and_training_is_the_same_without(
    tiny_data: Path, questions: Path, tmp_path: Path
) -> None:
    summary, asked = train(dataclasses.replace(CONFIG, hellaswag=str(questions)), tiny_data, tmp_path / "asked")
    rare = dataclasses.replace(CONFIG, val_every=12, sample_every=12)
    _, plain = train(rare, tiny_data, tmp_path / "plain")
    points = asked.metrics["eval/hellaswag_acc_norm"]
    assert [step for step, _ in points] == [5, 10, 12]
    assert asked.metrics["train/loss"] == plain.metrics["train/loss"], "not one bit differs"
    last = "checkpoints/step-000012"
    expected, found = weights(tmp_path / "plain" / last), weights(tmp_path / "asked" / last)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    again = score(tmp_path / "asked" / last, questions)
    assert (summary.hellaswag_acc_norm, summary.hellaswag_acc) == (again.acc_norm, again.acc)
    assert points[-1] == (12, again.acc_norm) and summary.hellaswag_questions == NUM_QUESTIONS


@pytest.mark.slow
def test_three_ranks_share_the_questions(tiny_data: Path, questions: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, hellaswag=str(questions), output=str(tmp_path / "three"))
    settings: dict[str, Any] = {"config": dataclasses.asdict(config), "data": [str(tiny_data)], "stop_after": None}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings | {"history": str(tmp_path / "history.json")}))
    result = run_ranks("trainer_process.py", file, world_size=3)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "three" / "summary.json").read_text())
    alone = score(tmp_path / "three" / "checkpoints" / "step-000012", questions)
    assert (summary["hellaswag_acc_norm"], summary["hellaswag_acc"]) == (alone.acc_norm, alone.acc)


def test_the_best_checkpoint_is_that_with_the_lowest_val_loss_also_after_a_restart(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are given. The lowest of all, of step 7, has no checkpoint; the lowest with one is of step 6."""
    losses = [6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 1.5, 2.7, 2.6, 2.0, 2.2, 2.9]
    left = iter([*losses, losses[-1]])  # the restart measures the last step again

    def given_loss(*_args: Any, **_settings: Any) -> ValidationResult:
        return ValidationResult(loss=next(left), tokens=200)

    monkeypatch.setattr(periodic_evaluation, "validation_loss", given_loss)
    config = dataclasses.replace(CONFIG, val_every=1)
    summary, tracker = train(config, tiny_data, tmp_path)
    saved = {step: losses[step - 1] for step in (3, 6, 9, 12)}
    assert tracker.metrics["val/loss"] == list(enumerate(losses, start=1))
    assert (summary.best_step, summary.best_val_loss) == (6, saved[6])
    assert tracker.best == 6
    assert {step: values["val_loss"] for step, values in tracker.checkpoint_metrics.items()} == saved
    (tmp_path / "summary.json").unlink()
    again, second = train(config, tiny_data, tmp_path)  # only what follows the last checkpoint
    assert (again.best_step, again.best_val_loss, second.best) == (6, saved[6], None)
    assert second.metrics["val/loss"] == tracker.metrics["val/loss"][-1:]
    best = read_best(open_folder(tmp_path))
    assert best is not None and best.step == 6


def test_the_hub_s_parquet_and_files_of_a_bucket_hold_the_same_questions(
    questions: Path, tmp_path: Path, s3: S3
) -> None:
    rows = [{**question, "label": str(question["label"])} for question in make_questions(NUM_QUESTIONS)]
    path = tmp_path / "0000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    expected = hellaswag.read_questions(questions)
    assert hellaswag.read_questions(path) == expected and len(expected) == NUM_QUESTIONS
    s3.put("runs/hellaswag.parquet", path.read_bytes())
    assert hellaswag.read_questions(f"{s3.url}/runs/hellaswag.parquet") == expected
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.read_questions(path)


def test_questions_go_into_the_run_s_folder(questions: Path, tmp_path: Path) -> None:
    address = resolve.copy_questions(questions, open_folder(tmp_path))
    assert address == str(tmp_path / "hellaswag.jsonl")
    assert hellaswag.read_questions(address) == hellaswag.read_questions(questions)
