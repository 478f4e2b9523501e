"""jobs/pretrain.py on a cluster: what the driver prepares, and the trainer as one worker runs it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.checkpoints.copying import copy_checkpoint
from pipeline.checkpoints.reader import find_checkpoint, list_checkpoints, read_description
from pipeline.cluster import ray_cluster
from pipeline.cluster.workers import (
    GroupSettings,
    SharedFiles,
    fits_this_process,
    run_in_process,
    run_workers,
    show_progress,
)
from pipeline.config.run_plan import opening
from pipeline.config.training import PretrainConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.training_data import Folders
from pipeline.distributed.process_group import init_distributed
from pipeline.distributed.signals import FileWatcher, Interruptions, call_in_thread, end_after_peer_error
from pipeline.distributed.startup_timer import StartupTimer
from pipeline.errors import PROGRAM_ERRORS, RunStopped, UserError
from pipeline.log_files import keep_log
from pipeline.paths import resolve_output, working_folder
from pipeline.pretrained.resolve import copy_questions, find_questions, resolve_checkpoint
from pipeline.run_files import CHECKPOINTS_FOLDER, LOGS_FOLDER, TASKS_FILE
from pipeline.storage.folders import Folder, in_bucket, open_folder
from pipeline.storage.locks import exclusive_output
from pipeline.tasks.catalog import read_tasks
from pipeline.tasks.questions import store_tasks
from pipeline.tracking.lineage import Parent, read_parent, write_parent
from pipeline.tracking.mlflow_run import MLflowRun, current_run, mlflow_client, open_run, recorded_run_id
from pipeline.tracking.mlflow_tracker import MLflowTracker, send_waiting
from pipeline.tracking.ray_metrics import RayMetrics
from pipeline.tracking.tracker import Tracker, Trackers
from pipeline.training.run_folder import (
    RunSummary,
    changed_settings,
    check_resumable,
    finished_summary,
    open_data_of_run,
    require_own,
)
from pipeline.training.trainer import Trainer

logger = logging.getLogger(__name__)

_MARK_SECONDS = 1.5  # of the 3 in which a run that has not begun ends


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every training worker needs to know."""

    config: PretrainConfig
    data: tuple[str, ...]
    """Addresses of the folders of shards, in the order of config.mixture."""
    output: str
    """Address of the run folder."""
    run: MLflowRun
    shows_progress: bool = True
    under_ray: bool = True
    """Whether Ray Train has started the worker; else it is the job's own process."""


def pretrain(
    config: PretrainConfig, files: SharedFiles | None = None, *, shows_progress: bool = True
) -> tuple[RunSummary, MLflowRun]:
    """Train as ``config`` says, on the cluster or in this process; returns at once if this run is done already.

    Args:
        files: the shared files of the workers, where another process is to ask them to stop.
        shows_progress: send the progress lines of rank 0 to the driver.

    Raises:
        RunStopped: SIGTERM or Ctrl-C asked for the end, and a checkpoint is saved.
        UserError: an error that the user can mend, from the driver or from any worker.
    """
    ray_cluster.require_device(config.device)
    data, output = data_folders(config), resolve_output(config.output)
    with exclusive_output(output):
        return _pretrain_alone(config, data, output, files, shows_progress)


def _pretrain_alone(
    config: PretrainConfig, data: Sequence[Folder], output: Folder, files: SharedFiles | None, shows_progress: bool
) -> tuple[RunSummary, MLflowRun]:
    begin_branch(config, data=data, output=output)
    summary = finished_summary(config, data=data, output=output)
    require_own(output)
    output.make()
    changed = changed_settings(config, output)
    if summary is not None:
        if changed and shows_progress:
            logger.warning("the run in %s is finished: %s has no effect; another --output trains anew", output, changed)
        run = _open_run(config, output, reopen=False)
        send_waiting(run, output, config.registry_name)
        return summary, current_run(output, run)
    logs = f"{output}/{LOGS_FOLDER}"
    with keep_log(open_folder(logs), "driver"):
        config = _with_inputs(config, output)
        if shows_progress:
            _announce(config, data)
            if changed:
                logger.info("the run in %s goes on with %s", output, changed)
        run = _open_run(config, output, reopen=True)
        settings = WorkerSettings(
            config=config, data=tuple(map(str, data)), output=str(output), run=run, shows_progress=shows_progress
        )
        summary = _run(settings, replace(group_settings(config), logs=logs), output, files)
    return summary, current_run(output, run)


def _run(settings: WorkerSettings, group: GroupSettings, output: Folder, files: SharedFiles | None) -> RunSummary:
    """Train on the workers of ``group``, or in this process where it is enough."""
    is_alone = files is None and fits_this_process(group)  # a trial of a sweep brings files, and Ray gives it its place
    files = files or SharedFiles(folder=str(output))
    files.delete_of_killed()
    with _marked_where_killed(settings.run):
        if is_alone:
            return run_in_process(pretrain_worker, replace(settings, under_ray=False), group, files)
        return run_workers(pretrain_worker, settings, group, output, files)


def _open_run(config: PretrainConfig, output: Folder, *, reopen: bool) -> MLflowRun:
    return open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=output,
        working_folder=working_folder(),
        job="pretrain",
        reopen=reopen,
    )


@contextlib.contextmanager
def _marked_where_killed(run: MLflowRun) -> Iterator[None]:
    """A context after which MLflow does not say that a run is running which was ended before it had begun."""
    try:
        yield
    except (KeyboardInterrupt, RunStopped) as error:
        if not isinstance(error, RunStopped) or error.at_once:
            deadline = time.monotonic() + _MARK_SECONDS
            with contextlib.suppress(Exception):  # the store may be away; the same command opens the run again
                client = mlflow_client(run.tracking_uri)
                update = functools.partial(client.update_run, run.run_id, status="KILLED")
                call_in_thread(update, give_up=lambda: time.monotonic() > deadline)
        raise


def data_folders(config: PretrainConfig) -> list[Folder]:
    """The folders of shards of a run."""
    return [resolve_output(folder) for folder in config.mixture.folders]


def begin_branch(config: PretrainConfig, *, data: Folders, output: Folder) -> None:
    """Make ``output`` the branch that --branch_from asks for, unless it is that already; nothing without the flag.

    A branch is a run of its own that begins at a checkpoint of another one, which is copied into its folder, with the
    optimizer state and the data order; from then on it is a run like any other.

    Raises:
        UserError: there is no such checkpoint, the branch's settings do not fit it, or ``output`` is another run.
    """
    if config.branch_from is None or config.step is None:
        return
    source = resolve_output(config.branch_from)
    checkpoints = open_folder(f"{output}/{CHECKPOINTS_FOLDER}")
    parent, has_begun = read_parent(output), bool(list_checkpoints(checkpoints))
    is_same = parent is not None and (parent.folder, parent.step) == (source.url, config.step)
    if has_begun and is_same:
        return
    if has_begun or (parent is not None and not is_same):
        was = f"a branch of {parent.folder} at step {parent.step}" if parent else "a run of its own"
        raise UserError(f"{output} is {was}; give another --output, or leave --branch_from and --step out to go on")
    place = _checkpoint_of(source, config.step)
    check_resumable(place, read_description(place).info, config, open_data_of_run(config, data))
    output.make()
    write_parent(output, Parent(folder=source.url, step=config.step, run_id=recorded_run_id(source)))
    copy_checkpoint(place, checkpoints, config.step)


def _checkpoint_of(source: Folder, step: int) -> Folder:
    found = dict(list_checkpoints(open_folder(f"{source}/{CHECKPOINTS_FOLDER}")))
    if step in found:
        return found[step]
    there = ", ".join(f"{each}" for each in found) or "none"
    raise UserError(
        f"{source} has no checkpoint of step {step}; the steps with one: {there} (--keep_checkpoints and --keep_every "
        "keep more of them)"
    )


def _with_inputs(config: PretrainConfig, output: Folder) -> PretrainConfig:
    """The settings with checkpoint and questions as workers find them; looked for before MLflow has a run of this."""
    if config.checkpoint:  # workers run in other folders
        found = find_checkpoint(open_folder(config.checkpoint)) if in_bucket(config.checkpoint) else None
        config = replace(config, checkpoint=str(found or resolve_checkpoint(config.checkpoint)))
    if config.hellaswag:  # the file may be on this machine only
        config = replace(config, hellaswag=copy_questions(find_questions(config.hellaswag), output))
    if config.tasks:
        store_tasks(read_tasks(config), output, TASKS_FILE)
    return config


def _announce(config: PretrainConfig, data: Sequence[Folder]) -> None:
    """Say what is about to be trained, before the workers start."""
    manifests = [Manifest.load(folder) for folder in data]
    tokens = [manifest.tokens("train") for manifest in manifests]
    line, warning = opening(config, vocab_size=manifests[0].vocab_size, train_tokens=tokens)
    logger.info(line)
    if warning:
        logger.warning(warning)


def group_settings(config: PretrainConfig) -> GroupSettings:
    """How the workers of a training run are run."""
    return GroupSettings(
        num_workers=config.num_workers,
        device=config.device,
        max_failures=config.max_failures,
        collective_timeout=config.collective_timeout,
        deterministic=config.deterministic == "on",
        resize_seconds=config.resize_seconds,
        stop_on_signals=True,
    )


def pretrain_worker(settings: WorkerSettings, files: SharedFiles) -> RunSummary:
    """Run the trainer in this worker."""
    config = settings.config
    startup = StartupTimer.from_environment() if settings.under_ray else StartupTimer()
    workers = init_distributed(config.device, deterministic=config.deterministic == "on")
    if settings.under_ray:
        show_progress(workers.is_rank_zero and settings.shows_progress)
    output = open_folder(settings.output)
    tracker = _tracker(settings, output) if workers.is_rank_zero else Tracker()
    stop_watcher = FileWatcher(lambda: workers.is_rank_zero and files.stop_requested())
    if workers.is_rank_zero:
        files.delete_begun()  # of a group that was lost
    watches_preemption = settings.under_ray and os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
    with contextlib.closing(stop_watcher), _failures_logged(tracker, files, may_restart=settings.under_ray):
        trainer = Trainer(
            config,
            data=[open_folder(address) for address in settings.data],
            output=output,
            workers=workers,
            tracker=tracker,
            startup=startup,
            interruptions=Interruptions(
                stop_requested=_told_at_first_call(stop_watcher, files, is_teller=workers.is_rank_zero),
                preemption_pending=_preemption_pending if watches_preemption else None,
            ),
        )
        return trainer.run()


def _told_at_first_call(
    stop_requested: Callable[[], bool], files: SharedFiles, *, is_teller: bool
) -> Callable[[], bool]:
    """``stop_requested``, which a step asks at its end: then there is work to save, which the driver has to know."""
    must_tell = is_teller

    def ask() -> bool:
        nonlocal must_tell
        if must_tell:
            with contextlib.suppress(UserError):  # the storage may answer at the next step
                files.write_begun()
                must_tell = False
        return stop_requested()

    return ask


def _preemption_pending() -> bool:
    """Whether Ray knows that a node of this group is about to be preempted. Collective."""
    from ray import train

    return train.get_preemption_info() is not None


def _tracker(settings: WorkerSettings, output: Folder) -> Tracker:
    """The tracker of rank 0: MLflow and, under Ray, its dashboard."""
    mlflow = MLflowTracker(settings.run, output, registered_model=settings.config.registry_name, sample_system=True)
    if not settings.under_ray:
        return mlflow
    return Trackers(mlflow, RayMetrics(output.url.rpartition("/")[2]))


@contextlib.contextmanager
def _failures_logged(tracker: Tracker, files: SharedFiles, *, may_restart: bool) -> Iterator[None]:
    """A context in which an error that no new start mends, here or in another worker, marks the run as failed."""
    try:
        with end_after_peer_error(files.has_error, lambda: tracker.finish("FAILED")):
            yield
    except (UserError, *PROGRAM_ERRORS):
        tracker.finish("FAILED")
        raise
    except RuntimeError:  # raised by a collective when another worker has left
        if not may_restart or files.has_error():
            tracker.finish("FAILED")
        raise
