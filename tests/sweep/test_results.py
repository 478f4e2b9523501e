"""The files of a sweep: its plan is kept, its table is ranked, its report shows every trial."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.sweep.report import draw, write_pages
from pipeline.sweep.results import Result, best_of, check_plan, ranked, read_results, table, write_results
from pipeline.sweep.trials import Trial
from pipeline.tracking.journal import Journal
from tests.support.factories import tiny_config


def trials(*rates: str) -> list[Trial]:
    return [
        Trial(name=f"trial-{index:03d}", varied={"lr": rate}, config=tiny_config(lr=float(rate)))
        for index, rate in enumerate(rates)
    ]


def results() -> list[Result]:
    return [
        Result(name="trial-000", varied={"lr": "1e-3"}, status="finished", steps=9, val_loss=3.0, best_val_loss=2.9),
        Result(name="trial-001", varied={"lr": "3e-3"}, status="failed", error="the loss is <not> finite"),
        Result(name="trial-002", varied={"lr": "1e-2"}, status="finished", steps=9, val_loss=2.5, best_val_loss=2.5),
        Result(name="trial-003", varied={"lr": "1e-1"}, status="stopped early", steps=3, val_loss=2.4),
    ]


def test_the_plan_is_kept(tmp_path: Path) -> None:
    output, planned = open_folder(tmp_path / "sweep"), trials("1e-3", "2e-3")
    check_plan(output, planned)
    check_plan(output, planned)
    moved = [replace(trial, config=replace(trial.config, max_failures=9, tracking_uri="x")) for trial in planned]
    check_plan(output, moved)
    with pytest.raises(UserError, match=r"holds a sweep of other trials \(2 of lr\)"):
        check_plan(output, trials("1e-3", "3e-3"))
    longer = [replace(trial, config=replace(trial.config, train_steps=13)) for trial in planned]
    with pytest.raises(UserError, match="a sweep with train_steps 12, now it is 13"):
        check_plan(output, longer)


@pytest.mark.parametrize("name", ["results.json", "results.csv", "report.html"])
def test_a_file_of_somebody_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(
        UserError, match=f"holds a {name} and no sweep, which would replace it; choose another --output"
    ):
        check_plan(open_folder(tmp_path), trials("1e-3"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("content", ["not json", "{}", "[]", "[1]", '[{"varied": 1, "settings": {}}]'])
def test_a_plan_of_somebody_elses_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json is not the plan of a sweep; choose another --output"):
        check_plan(open_folder(tmp_path), trials("1e-3"))
    assert (tmp_path / "plan.json").read_text() == content


def test_results_are_read_again(tmp_path: Path) -> None:
    output, planned = open_folder(tmp_path), trials("1e-3", "3e-3", "1e-2", "1e-1")
    assert [result.status for result in read_results(output, planned)] == ["waiting"] * 4
    known = results()
    known[1].status = "running"
    write_results(output, known)
    again = read_results(output, planned)
    assert [result.status for result in again] == ["finished", "interrupted", "finished", "stopped early"]
    assert again[0] == known[0]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["trial"] for row in rows] == [trial.name for trial in planned]
    assert rows[2]["lr"] == "1e-2" and float(rows[2]["val_loss"]) == 2.5 and rows[1]["val_loss"] == ""
    assert json.loads((tmp_path / "results.json").read_text())[3]["status"] == "stopped early"


def test_finished_trials_rank_before_those_stopped_early() -> None:
    assert [result.name[-1] for result in ranked(results())] == ["2", "0", "3", "1"]
    best = best_of(results())
    assert best is not None and best.name == "trial-002"
    assert best_of(results()[3:]) is None
    lines = table(results())
    assert lines[0].split() == ["trial", "lr", "status", "steps", "val", "loss"]
    assert lines[1].split() == ["trial-002", "1e-2", "finished", "9", "2.5000"]
    assert lines[4].split() == ["trial-001", "3e-3", "failed", "0"]


def test_a_trial_that_repeats_its_reports_does_not_go_back() -> None:
    result = Result(name="trial-000", varied={})
    for step, val_loss in ((10, 4.0), (15, None), (20, 5.0), (10, 4.0), (20, 5.0)):
        result.take(step, val_loss)
    assert (result.steps, result.val_loss, result.best_val_loss) == (20, 5.0, 4.0)


def test_the_report_shows_every_trial(tmp_path: Path) -> None:
    output = open_folder(tmp_path)
    assert write_pages(output, results(), {"d_model": 32}) == ["report.html"], "no curve yet"
    for result in (results()[0], results()[2]):
        folder = open_folder(tmp_path / result.name)
        folder.make()
        journal = Journal(folder)
        for step in (3, 6, 9):
            journal.append("metrics", step=step, values={"val/loss": 4.0 - step / 10, "train/loss": 4.0})
        journal.close()
    assert write_pages(output, results(), {"d_model": 32}) == ["curves.png", "report.html"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "3 of 4 trials have ended" in page and "Best: trial-002, val loss 2.5000, lr 1e-2." in page
    assert "the loss is &lt;not&gt; finite" in page and "data:image/png;base64," in page
    for result in results():
        assert result.name in page


def test_settings_that_are_words_have_a_picture_too() -> None:
    known = [
        Result(name=name, varied={"optimizer": name, "lr": "1e-3"}, status="finished", val_loss=3.0)
        for name in ("adamw", "muon")
    ]
    assert draw(known, {"adamw": [(1, 3.0)], "muon": [(1, 3.0)]}) is not None
    assert draw(known, {"adamw": [], "muon": []}) is None
