"""The model card of an exported run is its report card: published results, samples and cost beside its own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.inference import ExportConfig
from pipeline.pretrained.export_job import export
from pipeline.published_results import PUBLISHED
from pipeline.storage.folders import open_folder
from tests.support.models import train

HOUR = 3_600_000  # the journal's times are in milliseconds


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Path:
    path = train(tiny_data, tmp_path / "run")
    lines: list[dict[str, Any]] = [
        {"kind": "start", "time": 0},
        {"kind": "params", "time": 0, "values": {"price_per_hour": 2.5}},
        {"kind": "tags", "time": 0, "values": {"workers": "4"}},
        *({"kind": "sample", "time": HOUR, "step": step, "prompt": "", "text": f"text {step}"} for step in (10, 20)),
        {"kind": "sample", "time": HOUR, "step": 30, "prompt": "", "text": "```\n# no heading\n\n<b>"},
        {"kind": "sample", "time": HOUR, "step": 40, "prompt": "", "text": "the last one"},
        {"kind": "sample", "time": HOUR, "step": 50, "prompt": "", "text": "after the checkpoint"},
        {"kind": "metrics", "time": 2 * HOUR, "step": 40, "values": {"train/loss": 3.0}},
    ]
    journal = "".join(json.dumps(line) + "\n" for line in lines).encode()
    open_folder(tmp_path / "run").write("tracking.jsonl", [journal])
    return path


def card_of(run: Path, tmp_path: Path, scores: dict[str, Any]) -> str:
    content = json.dumps({"checkpoint": str(run)} | scores).encode()
    open_folder(tmp_path / "run").write("evaluation.json", [content])
    export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "exported")))
    return (tmp_path / "exported" / "README.md").read_text()


def test_the_card_has_published_results_samples_and_cost(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path, {"val_loss": 3.2, "hellaswag_acc_norm": 0.3011, "core": 0.1, "core_stderr": 0.01})
    rows = card.partition("## Beside published results\n\n")[2].partition("\n\n")[0].splitlines()
    assert rows[0] == "|  | tokens | val loss | HellaSwag, acc_norm | CORE | source |"
    assert rows[2].startswith("| this model | ") and "| 3.2000 | 0.3011 | 0.1000 | val loss on its own" in rows[2]
    assert len(rows) == 3 + len(PUBLISHED) and all(row.count("|") == 7 for row in rows)
    assert "| GPT-2.5, 124M, its author's | 10.49 B | 3.3041 (own test file) | 0.3059 |" in card
    samples = card.partition("## Samples\n\n")[2].partition("## Speed")[0]
    assert samples.count("steps:") == 3 and "    text 20\n" in samples and "    the last one\n" in samples
    assert "    ```\n    # no heading\n    \n    <b>\n" in samples, "what a model says is no Markdown"
    assert "after the checkpoint" not in card
    assert "| cost | $20.00 at $2.50 per worker and hour |" in card


def test_a_val_loss_with_the_document_mask_says_so(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path, {"val_loss": 3.2, "hellaswag_acc_norm": 0.3, "document_mask": True})
    assert "| val loss with each token seeing its own document alone | yes |" in card
    assert "| val loss on its own val set, each seeing its own document alone (document_mask) |" in card
    assert "document alone | yes" not in card_of(run, tmp_path, {"val_loss": 3.2})


def test_a_val_loss_alone_compares_with_nothing(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path, {"val_loss": 3.2})
    assert "Beside published results" not in card and "| val loss, whole val set | 3.2000 |" in card
    hellaswag = {"questions": 5, "num_fewshot": 0, "acc": 0.2, "acc_stderr": 0.1, "acc_norm": 0.4}
    assert "| this model |" in card_of(run, tmp_path, {"tasks": {"hellaswag": hellaswag}})


def test_scores_that_are_none_are_left_out(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"tasks": "many", "core": "high", "hellaswag_acc_norm": {}}.items():
        caplog.clear()
        card = card_of(run, tmp_path, {"val_loss": 3.2, name: value})
        assert "val loss, whole val set" not in card
        assert "the model card says nothing of scores" in caplog.text and name in caplog.text
