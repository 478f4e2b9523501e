"""benchmarks/recipes.py from end to end, tiny; its ladder ends at the presets, and its report reads runs as it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import recipes
from benchmarks.recipes_report import share_of_tokens

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {
    *("data", "output", "num_heads", "train_steps", "tokens_per_step", "batch_size", "num_workers", "device"),
    *("val_every", "hellaswag", "hellaswag_every"),
}
"""Keys of the presets that are no part of a recipe."""


@pytest.mark.parametrize("name", ["fast", "fastest"])
def test_the_ladder_ends_at_the_preset(name: str) -> None:
    preset = {key: value for key, value in recipes.preset_values(name).items() if key not in OTHERS}
    found = recipes.settings(name, preset["lr"])
    if "muon_coefficients" in preset:
        assert found.pop("muon_coefficients") == tuple(preset.pop("muon_coefficients"))
    assert found == pytest.approx(preset)


def test_every_change_keeps_those_before() -> None:
    """Each has the settings of the one before and some others, except that a rate or a decay may get another value."""
    names = ["adamw", *recipes.CHANGES]
    for before, after in itertools.pairwise(names):
        assert recipes.settings(before, 0.01).keys() <= recipes.settings(after, 0.01).keys()
        assert recipes.settings(before, 0.01) != recipes.settings(after, 0.01), after


def test_runs_are_made_once_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    parts = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    pq.write_table(pa.table({"text": parts}), tmp_path / "part.parquet")
    results = tmp_path / "results.jsonl"
    command = ["recipes.py", "--corpus", str(tmp_path), "--results", str(results), "--sizes", "tiny"]
    command += ["--vocab_size", "300", "--tokens_per_step", "256", "--report", str(tmp_path / "report")]
    monkeypatch.setattr("sys.argv", command)
    recipes.main()
    lines = results.read_text().splitlines()
    first = [json.loads(line) for line in lines]
    assert [run["job"]["recipe"] for run in first[:4]] == ["adamw", "adamw", "muon", "muon"]
    assert {run["job"]["recipe"] for run in first} == {"adamw", *recipes.CHANGES}
    assert {run["job"]["seed"] for run in first} == {0, 1}

    results.write_text("\n".join(lines[:-2]) + "\n")  # as if it had been stopped before the last two
    capsys.readouterr()
    recipes.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [run["losses"] for run in again] == [run["losses"] for run in first], "a run is a function of its job"
    tables = (tmp_path / "report/recipes_tables.md").read_text()
    assert f"| fastest | {best_loss(first, 'fastest'):.3f} |" in tables
    assert "<svg" in (tmp_path / "report/recipes.svg").read_text()


def best_loss(runs: list[dict[str, Any]], recipe: str) -> float:
    """Of the longest runs with seed 0."""
    steps = max(run["job"]["steps"] for run in runs)
    chosen = [r for r in runs if (r["job"]["recipe"], r["job"]["seed"], r["job"]["steps"]) == (recipe, 0, steps)]
    return float(min(run["losses"][-1][1] for run in chosen))


@pytest.mark.parametrize(
    ("runs", "share"),
    [
        ([(100, 6.0), (300, 5.0)], "at most 100%"),
        ([(50, 7.0), (100, 6.5), (300, 6.2)], "more than 300%"),
        ([(25, 7.0), (100, 5.0)], "50%"),  # half the way down is half the logarithm
        ([(25, 6.5), (50, 6.0), (100, 5.0)], "50%"),
        ([], ""),
    ],
)
def test_the_share_of_tokens(runs: list[tuple[int, float]], share: str) -> None:
    assert share_of_tokens(runs, tokens=100, goal=6.0) == share
