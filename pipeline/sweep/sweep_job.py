"""jobs/sweep.py: trials under Ray Tune, as many at a time as the cluster holds, each a run of jobs/pretrain.py.

Ray Tune decides when a trial begins and which end early, and begins a trial again whose process died. It keeps its
state in pickles, which are written to a temporary folder and never read: the truth is in the folder of the sweep
(results.py), and the same command starts a new Tuner over the trials that have not ended.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.cluster import ray_cluster
from pipeline.cluster.workers import SharedFiles, choose_gpu, stopped
from pipeline.config.mixtures import with_folders
from pipeline.config.settings import to_dict
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import worker_range
from pipeline.distributed.signals import GivenUp, call_in_thread, stop_on_signals
from pipeline.errors import RunStopped, UserError
from pipeline.paths import resolve_output, working_folder
from pipeline.storage.folders import Folder, open_folder
from pipeline.storage.locks import exclusive_output
from pipeline.sweep.board import Board
from pipeline.sweep.results import Result, check_plan, read_results, val_losses, write_results
from pipeline.sweep.trials import Trial
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_uri, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.training.launch import data_folders, group_settings
from pipeline.training.run_folder import finished_summary

logger = logging.getLogger(__name__)

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files of Tune's own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has a val loss
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the board shows them
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints a table of settings although verbose is 0
}
_PASSED_ON = ("GPT25_AUTOSCALING", "GPT25_MAX_CPUS")


def sweep(config: SweepConfig, trials: Sequence[Trial]) -> tuple[list[Result], MLflowRun]:
    """Train all trials that have not ended; returns the state of all.

    Raises:
        RunStopped: SIGTERM or Ctrl-C asked for the end; every trial that was training has saved a checkpoint.
        UserError: the sweep cannot begin, or no trial has given a result.
    """
    ray_cluster.require_device(trials[0].config.device)
    output = resolve_output(config.output)
    trials = [_with_full_addresses(trial) for trial in trials]
    with exclusive_output(output):
        for trial in trials:
            require_data(trial)
        check_plan(output, trials)
        results = _current_results(output, trials)
        shared = trials[0].config
        run = open_run(
            tracking_uri=shared.tracking_uri,
            experiment=shared.experiment,
            folder=output,
            working_folder=working_folder(),
            job="sweep",
        )
        _run_trials(config, trials, results, output, run)
    if all(result.status == "failed" for result in results):
        raise UserError(f"no trial of the sweep gave a result; {results[0].name} failed: {results[0].error}")
    return results, run


def require_data(trial: Trial) -> None:
    """Check that a trial can begin or resume, as its training would; needs no Ray."""
    try:
        _summary(trial)
    except UserError as error:
        raise UserError(f"{trial.label}: {error}") from error


def _summary(trial: Trial) -> Any:
    return finished_summary(trial.config, data=data_folders(trial.config), output=open_folder(trial.config.output))


def _with_full_addresses(trial: Trial) -> Trial:
    """The same trial with addresses that do not depend on the process that reads them."""
    config = trial.config
    uri = mlflow_uri(config.tracking_uri, working_folder())
    data, phase = with_folders(config.data, config.phase, lambda folder: str(resolve_output(folder)))
    return replace(trial, config=replace(config, data=data, phase=phase, tracking_uri=uri))


def _current_results(output: Folder, trials: Sequence[Trial]) -> list[Result]:
    """The state of every trial; what a run folder says of its run comes before what the sweep noted."""
    results = read_results(output, trials)
    for trial, result in zip(trials, results, strict=True):
        summary = _summary(trial)
        if summary is not None:
            result.status, result.error = "finished", ""
            result.take(summary.steps, summary.val_loss)
    write_results(output, results)
    return results


def _run_trials(
    config: SweepConfig, trials: Sequence[Trial], results: list[Result], output: Folder, run: MLflowRun
) -> None:
    """Run the trials that have not ended, and end the sweep's own MLflow run with the state that comes of it."""
    varied = trials[0].varied.keys()
    shared = {name: value for name, value in to_dict(trials[0].config).items() if name not in {*varied, "output"}}
    board: Board

    def pages(folder: Folder, entries: Iterable[Any]) -> list[str]:
        return board.write_pages()

    tracker = MLflowTracker(run, output, write_pages=pages)
    board = Board(output, results, shared, tracker)
    tracker.log_params({**to_dict(config), **shared})
    tracker.log_tags({"trials": str(len(trials))})
    status: Any = "FAILED"
    try:
        left = [trial for trial, result in zip(trials, results, strict=True) if not result.has_ended]
        if left:
            _tune(config, trials, left, board, run)
        status = "FINISHED"
    except RunStopped:
        status = "KILLED"
        raise
    finally:
        board.save(is_new=False)
        tracker.finish(status)


def _tune(config: SweepConfig, trials: Sequence[Trial], left: Sequence[Trial], board: Board, run: MLflowRun) -> None:
    """Run ``left`` under Ray Tune."""
    at_once = _slots(config, left)
    logger.info("%d of %d trials to train, %d at a time", len(left), len(trials), at_once)
    from pipeline.sweep import tuning
    from pipeline.sweep.early_stopping import build_rule, tell_rule
    from pipeline.sweep.trainable import TrialJob

    jobs = {
        trial.name: TrialJob(config=trial.config, files=SharedFiles(folder=trial.config.output), parent_run=run.run_id)
        for trial in left
    }

    desk = tuning.Desk(board, jobs)
    rule = build_rule(config, {trial.name: trial.config.train_steps for trial in trials}, desk.end_early)
    ended = [result.name for result in board.results if result.has_ended]
    tell_rule(rule, {name: val_losses(board.output, name) for name in ended})
    place = tempfile.TemporaryDirectory(prefix="gpt25-", ignore_cleanup_errors=True)
    with stop_on_signals(desk.request_stop) as request, place as storage:
        tuner = tuning.build_tuner(
            desk,
            rule,
            at_once=at_once,
            max_failures=left[0].config.max_failures,
            environment=_environment(),
            storage=storage,
        )
        at_once = False
        try:  # in the main thread Ray Tune would take Ctrl-C
            call_in_thread(tuner.fit, give_up=lambda: request() and not desk.has_begun())
        except GivenUp:
            at_once = True
    if request():
        sentence = f"stopped; the same command goes on with the trials of {board.output}"
        raise stopped(sentence, request, at_once=at_once)


def _slots(config: SweepConfig, trials: Sequence[Trial]) -> int:
    """Number of trials to train at a time, with Ray started. A group that grows counts with its fewest workers.

    Raises:
        UserError: the cluster cannot hold the largest trial.
    """
    os.environ.update({name: value for name, value in _TUNE_ENVIRONMENT.items() if name not in os.environ})
    most = max(worker_range(trial.config.num_workers)[0] for trial in trials)
    ray_cluster.connect(num_cpus=max(most, os.cpu_count() or 1))
    import ray

    on_gpus = any(choose_gpu(group_settings(trial.config)) for trial in trials)
    ray_cluster.require(num_workers=most, gpus=on_gpus)
    places = int(ray.cluster_resources().get("GPU", 0)) if on_gpus else ray_cluster.cpus()
    held = max(1, places // most)
    return min(len(trials), config.trials_at_once or held)


def _environment() -> Mapping[str, str]:
    """Variables of this driver that the process of a trial needs, in which paths count from the same folder."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith("RAY_TRAIN_")}
    return {"GPT25_HOME": str(working_folder()), **passed}
