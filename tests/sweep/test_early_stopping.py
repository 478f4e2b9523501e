"""Ray Tune's rules as a sweep uses them: which trials they end, and that a sweep that goes on decides the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from ray.tune.schedulers import FIFOScheduler

from pipeline.config.sweep import SweepConfig
from pipeline.sweep.early_stopping import build_rule, tell_rule

CONTINUE = "CONTINUE"
STEPS = 90


@dataclass(eq=False)
class FakeTrial:
    """A trial as far as a rule looks at it."""

    trial_id: str
    config: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.config = {"trial": self.trial_id}


class Sweep:
    """A rule and trials that report to it."""

    def __init__(self, early_stopping: Literal["none", "asha", "median"], names: str) -> None:
        self.stopped: list[str] = []
        config = SweepConfig(vary=("lr=1,2",), early_stopping=early_stopping, min_steps=10)
        self.rule: Any = build_rule(config, dict.fromkeys(names, STEPS), self.stopped.append)
        self.trials = {name: FakeTrial(name) for name in names}

    def add(self, names: str) -> None:
        for name in names:
            self.rule.on_trial_add(None, self.trials[name])

    def report(self, name: str, step: int, val_loss: float | None) -> None:
        report = {"step": step} if val_loss is None else {"step": step, "val_loss": val_loss}
        assert self.rule.on_trial_result(None, self.trials[name], report) == CONTINUE


def test_asha_lets_the_best_third_go_on() -> None:
    sweep = Sweep("asha", "abcdef")
    sweep.add("abcdef")
    for name, loss in zip("abcdef", (3.0, 4.0, 5.0, 2.5, 3.5, 2.0), strict=True):
        sweep.report(name, 5, 9.0)  # too early to say
        sweep.report(name, 10, loss)
    # successive halving by the paper (arXiv 1810.05934), one by one: a third of what reported so far goes on
    assert sweep.stopped == ["b", "c", "e"]
    sweep.report("b", 15, 9.0)
    sweep.report("a", 12, None)
    assert sweep.stopped == ["b", "c", "e"], "a trial is asked once, and a report without a loss decides nothing"


def test_asha_stops_none_at_its_last_step() -> None:
    sweep = Sweep("asha", "ab")
    sweep.add("ab")
    for step in (10, 30, STEPS):
        sweep.report("a", step, 2.0)
    sweep.report("b", STEPS, 3.0)
    assert sweep.stopped == []


def test_median_stops_what_is_worse_than_the_others_means() -> None:
    sweep = Sweep("median", "abcd")
    sweep.add("abcd")
    for name, losses in (("a", (4.0, 3.0)), ("b", (4.2, 3.2)), ("c", (4.4, 3.4)), ("d", (6.0, 5.0))):
        for step, loss in zip((10, 20), losses, strict=True):
            sweep.report(name, step, loss)
    assert sweep.stopped == ["d"]  # means 3.5, 3.7, 3.9 at step 20: 5.0 is above their median


@pytest.mark.parametrize("early_stopping", ["asha", "median"])
def test_a_sweep_that_goes_on_decides_as_one_that_was_never_interrupted(
    early_stopping: Literal["asha", "median"],
) -> None:
    losses = {"a": 4.0, "b": 4.1, "c": 4.2, "d": 6.0}
    points = {name: [(step, loss - step / 100) for step in (10, 20, 30)] for name, loss in losses.items()}
    whole = Sweep(early_stopping, "abcd")
    whole.add("abcd")
    for name in "abcd":
        for step, loss in points[name]:
            whole.report(name, step, loss)
    again = Sweep(early_stopping, "abcd")
    tell_rule(again.rule, {name: points[name] for name in "abc"})
    again.add("d")
    for _ in range(2):  # its process died in between, and reports the same again
        for step, loss in points["d"]:
            again.report("d", step, loss)
    assert again.stopped == ["d"] == whole.stopped[-1:]
    alone = Sweep(early_stopping, "abcd")
    alone.add("d")
    for step, loss in points["d"]:
        alone.report("d", step, loss)
    assert alone.stopped == [], "without the others there is nothing to stop it"


def test_without_early_stopping_nothing_is_stopped() -> None:
    rule = build_rule(SweepConfig(vary=("lr=1,2",)), {"a": STEPS}, lambda name: None)
    assert type(rule) is FIFOScheduler
    tell_rule(rule, {"a": [(10, 1.0)]})
