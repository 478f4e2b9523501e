"""Ray Tune, told what to run and asked what became of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler

from pipeline.sweep.board import Board
from pipeline.sweep.trainable import FAILED, FINISHED, TrialJob, TrialProcess


class Desk:
    """Passes on what Ray Tune reports to the board, and requests to stop to the trials."""

    def __init__(self, board: Board, jobs: Mapping[str, TrialJob]) -> None:
        self.board, self.jobs = board, jobs
        self.is_stopping = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, for the pickles that Ray Tune writes and nobody reads."""
        return {}

    def request_stop(self) -> None:
        """Ask every trial to end with a checkpoint; none begins after it."""
        self.is_stopping = True
        for name in self.board.running:
            self.jobs[name].files.request_stop()

    def has_begun(self) -> bool:
        """Whether a trial that is running has done work that it has still to save."""
        return any(self.jobs[name].files.has_begun() for name in list(self.board.running))

    def begin(self, name: str) -> None:
        self.board.begin(name)
        if self.is_stopping:
            self.jobs[name].files.request_stop()

    def end_early(self, name: str) -> None:
        """A rule ends a trial; it has its time for a checkpoint."""
        self.board.end_early(name)
        self.jobs[name].files.request_stop()

    def report(self, name: str, report: Mapping[str, Any]) -> None:
        self.board.report(name, int(report["step"]), report.get("val_loss"))

    def end(self, name: str, report: Mapping[str, Any]) -> None:
        """A trial has ended by itself."""
        outcome = report.get("outcome")
        self.jobs[name].files.delete()
        if outcome == FINISHED:
            self.board.finish(name)
        elif outcome == FAILED:
            self.board.fail(name, report["error"])
        else:
            self.board.stop(name)

    def fail(self, name: str, error: Exception | None) -> None:
        """The process of a trial has died too often, or raised what no user can mend."""
        lines = str(error).strip().splitlines() or [repr(error)]
        self.board.fail(name, lines[-1].strip())

    def lost(self, name: str) -> None:
        """The process of a trial has died; Ray Tune begins the trial again."""
        logging.getLogger(__name__).warning("lost: the process of %s; it goes on from its newest checkpoint", name)


class _Callback(tune.Callback):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._desk.begin(trial.config["trial"])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._desk.report(trial.config["trial"], result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._desk.end(trial.config["trial"], trial.last_result)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._desk.lost(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._desk.fail(trial.config["trial"], trial.get_error())


class _Stopper(tune.Stopper):
    """Ends Ray Tune when the sweep is to stop and its trials have ended."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: Any) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._desk.is_stopping and not self._desk.board.running


def build_tuner(
    desk: Desk,
    rule: TrialScheduler,
    *,
    at_once: int,
    max_failures: int,
    environment: Mapping[str, str],
    storage: str,
) -> tune.Tuner:
    """A Tuner over the trials of ``desk``.

    Args:
        rule: what ends trials early.
        at_once: number of trials at a time.
        max_failures: number of times that the process of a trial may die; -1 for any number.
        environment: variables for the processes of the trials.
        storage: a folder for what Ray Tune writes.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns of files that it was told not to write
    # Not in param_space, which Ray shows to everyone: MLflow's address may hold a password.
    trainable = tune.with_parameters(TrialProcess, jobs=dict(desk.jobs), environment=environment)
    trainable.__qualname__ = TrialProcess.__name__  # the name that Ray shows of its processes
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(desk.jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            scheduler=rule,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage,
            verbose=0,
            stop=_Stopper(desk),
            callbacks=[_Callback(desk)],
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _name(trial: Any) -> str:
    return str(trial.config["trial"])
