"""The rules of Ray Tune that stop trials by their val loss, made to end a trial gently and to know its history.

A trial that a rule stops is asked to end, which it does with a checkpoint, instead of being killed. A rule of a sweep
that goes on is first told what the trials of before have reported; what a trial reports again is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from pipeline.config.sweep import SweepConfig

_NAMES: dict[str, Any] = {"time_attr": "step", "metric": "val_loss", "mode": "min"}
_ENDS = (TrialScheduler.STOP, TrialScheduler.PAUSE)
_DEFAULT_SHARE = 10  # of the steps, before which no trial is stopped


@dataclass(eq=False)  # a key of dictionaries
class _PastTrial:
    """A trial that has ended before, as far as a rule looks at it."""

    trial_id: str


class _Gentle:
    """Mixed into a rule: it asks trials to end, and never stops or pauses one itself."""

    def prepare(self, last_steps: Mapping[str, int], on_stop: Callable[[str], None]) -> None:
        """Say how the rule is used.

        Args:
            last_steps: trial -> its last step, at which stopping it would mean nothing.
            on_stop: called with the name of a trial that is to end early.
        """
        self._last_steps, self._on_stop = last_steps, on_stop
        self._seen: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["trial"]
        if "val_loss" in result and result["step"] > self._seen.get(name, -1):
            self._seen[name] = result["step"]
            decision = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
            if decision in _ENDS and result["step"] < self._last_steps[name]:
                self._seen[name] = self._last_steps[name]  # nothing it reports until its end counts
                self._on_stop(name)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: the last report of a trial has no val loss."""

    def tell(self, name: str, points: Sequence[tuple[int, float]]) -> None:
        """Tell the rule of the steps and val losses that a trial reported before."""
        past = _PastTrial(trial_id=name)
        super().on_trial_add(None, past)  # type: ignore[misc]
        for step, val_loss in points:
            report = {"step": step, "val_loss": val_loss}
            super().on_trial_result(None, past, report)  # type: ignore[misc]


class _GentleASHA(_Gentle, ASHAScheduler):
    pass


class _GentleMedian(_Gentle, MedianStoppingRule):
    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Go on; the original would pause the trial, which needs a checkpoint of Ray Tune's."""
        return str(TrialScheduler.CONTINUE)


def build_rule(config: SweepConfig, last_steps: Mapping[str, int], on_stop: Callable[[str], None]) -> TrialScheduler:
    """The rule that ``config`` names; one that stops nothing without early stopping."""
    if config.early_stopping == "none":
        return FIFOScheduler()
    most = max(last_steps.values())
    first = min(config.min_steps or max(1, most // _DEFAULT_SHARE), most)
    rule: _GentleASHA | _GentleMedian
    if config.early_stopping == "asha":
        rule = _GentleASHA(
            **_NAMES, max_t=most, grace_period=first, reduction_factor=config.reduction_factor, stop_last_trials=False
        )
    else:
        # Not hard: a trial of before that it would stop today may report more.
        rule = _GentleMedian(**_NAMES, grace_period=first, hard_stop=False)
    rule.prepare(last_steps, on_stop)
    return rule


def tell_rule(rule: TrialScheduler, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Tell a rule of the steps and val losses that trials which have ended reported."""
    if isinstance(rule, _Gentle):
        for name, reports in points.items():
            rule.tell(name, reports)
