"""A compiled run on two ranks under FSDP2: what is compiled at the start is all that is ever compiled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.hellaswag_questions import write_questions
from tests.support.ranks import run_ranks
from tests.training.test_trainer import CONFIG, train_here

STEPS = 6
NUM_LAYERS = 3


def run(data: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """What every rank counted; see compiled_process.py."""
    whole = changes.pop("whole")
    config = dataclasses.replace(compiled_config(folder), **changes)
    settings = folder / "settings.json"
    settings.write_text(
        json.dumps(
            {
                "config": dataclasses.asdict(config),
                "data": str(data),
                "whole": whole,
                "history": str(folder / "history.json"),
            }
        )
    )
    result = run_ranks("compiled_process.py", settings, world_size=2)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"history.json.{rank}").read_text()) for rank in range(2)]


def compiled_config(folder: Path) -> Any:
    """Three micro-batches a step and rank, another learning rate every step, three evaluations.

    The val tokens are seven windows of 32 and a rest: rank 0 has batches of 2 and 2 windows, rank 1 of 2 and 1.
    """
    return dataclasses.replace(
        CONFIG,
        num_layers=NUM_LAYERS,
        train_steps=STEPS,
        warmup_fraction=0.5,
        val_every=2,
        val_tokens=7 * 32 + 9,
        sample_every=4,
        hellaswag=str(write_questions(folder / "hellaswag_val.jsonl", 5)),
        hellaswag_every=4,
        checkpoint_every=100,
        compile="on",
        output=str(folder / "run"),
    )


# Graphs of the network: one from tokens to loss; or one of a block, which all blocks share, and one of the loss. They
# are compiled without gradients, for validation, and with them; beside them there is the optimizer's kernel.
@pytest.mark.parametrize(
    ("whole", "changes", "graphs"),
    [
        (True, {"optimizer": "adamw"}, 1),
        pytest.param(True, {"optimizer": "adamw", "document_mask": True}, 1, marks=pytest.mark.slow),
        (False, {"optimizer": "muon"}, 2),
    ],
)
def test_nothing_is_compiled_after_the_first_step(
    whole: bool, changes: dict[str, Any], graphs: int, tiny_data: Path, tmp_path: Path
) -> None:
    ranks = run(tiny_data, tmp_path, whole=whole, **changes)
    for rank in ranks:
        assert rank["graph_breaks"] == {}
        assert rank["counts"][0] == ["compile", graphs]
        assert rank["counts"][1:] == [["step", 2 * graphs + 1], ["evaluation", 2 * graphs + 1]] * STEPS
    plain = dataclasses.replace(compiled_config(tmp_path), **changes, compile="off")
    summary, tracker = train_here(plain, tiny_data, tmp_path / "plain")
    # One rank and other kernels: sums in another order, which Adam's first steps and Muon's bfloat16 magnify.
    tolerance = 1e-4 if changes["optimizer"] == "adamw" else 1e-3
    assert ranks[0]["losses"] == pytest.approx([loss for _, loss in tracker.metrics["train/loss"]], rel=tolerance)
    assert ranks[0]["val_loss"] == pytest.approx(summary.val_loss, rel=tolerance)
