"""Workers on a cluster: Ray Train starts them, restarts them when one is lost, and brings back what they computed.

Checkpoints are the trainer's own (checkpoint.py), on a folder that every worker sees: a restarted group of workers
finds the newest there, and so does the same command given again after the whole job died.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Protocol

import psutil

from pipeline.checkpoints.reader import find_checkpoint
from pipeline.cluster import ray_cluster
from pipeline.config.training import PretrainConfig, worker_range
from pipeline.distributed.process_group import backend_name
from pipeline.distributed.signals import (
    Interruptions,
    PeerErrorWatcher,
    StopFileWatcher,
    call_in_thread,
    stop_on_signals,
)
from pipeline.distributed.startup_timer import StartupTimer
from pipeline.errors import RunStopped, UserError
from pipeline.paths import resolve_output, working_folder
from pipeline.pretrained.resolve import copy_questions, find_questions, resolve_checkpoint
from pipeline.storage.folders import Folder, in_bucket, open_folder
from pipeline.storage.locks import exclusive_output
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker, send_waiting
from pipeline.tracking.ray_metrics import RayMetrics
from pipeline.tracking.tracker import Tracker, Trackers
from pipeline.training.run_folder import RunSummary, finished_summary
from pipeline.training.trainer import Trainer

logger = logging.getLogger(__name__)

_COLLECTIVE_SECONDS = 600  # where a job's settings do not say how long workers wait for each other

Settings = dict[str, Any]


def pretrain(config: PretrainConfig) -> tuple[RunSummary, MLflowRun]:
    """Train as ``config`` says, on the cluster; at once if this run is done already.

    Raises:
        RunStopped: SIGTERM or Ctrl-C asked for the end, and what is done is saved.
        UserError: what the user can mend, from the driver or from any worker.
    """
    data, output = resolve_output(config.data), resolve_output(config.output)
    with exclusive_output(output):
        return _pretrain_alone(config, data, output)


def _pretrain_alone(config: PretrainConfig, data: Folder, output: Folder) -> tuple[RunSummary, MLflowRun]:
    summary = finished_summary(config, data=data, output=output)
    output.make()
    run = open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=output,
        working_folder=working_folder(),
        job="pretrain",
        reopen=summary is None,
    )
    if summary is not None:
        send_waiting(run, output, config.registry_name)
        return summary, run
    if config.checkpoint:  # found here: workers run in other folders
        found = find_checkpoint(open_folder(config.checkpoint)) if in_bucket(config.checkpoint) else None
        config = replace(config, checkpoint=str(found or resolve_checkpoint(config.checkpoint)))
    if config.hellaswag:  # may lie on this machine alone
        config = replace(config, hellaswag=copy_questions(find_questions(config.hellaswag), output))
    settings = {"config": asdict(config), "data": str(data), "output": str(output), "run": asdict(run)}
    settings["stop_note"] = f"stop-{uuid.uuid4().hex}"
    result = run_workers(pretrain_worker, settings, config, notes=output, max_failures=config.max_failures)
    return RunSummary(**result), run


class WorkersConfig(Protocol):
    """Settings of any job that runs workers."""

    @property
    def num_workers(self) -> int | str: ...

    @property
    def device(self) -> str: ...


def run_workers(
    worker: Callable[[Settings], Settings],
    settings: Settings,
    config: WorkersConfig,
    *,
    notes: Folder,
    max_failures: int,
) -> Settings:
    """Run ``worker(settings)`` on config.num_workers workers of one process group; rank 0's result.

    Args:
        settings: with "stop_note", SIGTERM and Ctrl-C leave a note of that name for the workers, who end the run.
        notes: a folder that every worker sees.
        max_failures: losses of a group of workers that are survived; -1 for any number.

    Raises:
        UserError: from a worker, or because the cluster cannot hold the workers.
    """
    fewest, most = worker_range(config.num_workers)
    ray_cluster.connect(num_cpus=max(fewest, os.cpu_count() or 1))
    use_gpu = choose_gpu(config)
    ray_cluster.require(num_workers=fewest, gpus=use_gpu)
    from ray.train import TrainingFailedError

    from pipeline.cluster.worker_group import was_lost_while_starting

    note = f"error-{uuid.uuid4().hex}"
    settings = {**settings, "notes": str(notes), "error_note": note}
    elastic = fewest < most
    with _environment(_ray_train_settings(elastic)), tempfile.TemporaryDirectory(prefix="gpt25-") as storage:
        try:
            lost = 0
            while True:
                trainer = _ray_trainer(
                    worker, settings, config, use_gpu=use_gpu, max_failures=max_failures, storage=storage
                )
                try:
                    return _unwrap(_fit(trainer, notes, settings.get("stop_note")))
                except TrainingFailedError as error:
                    if sentence := _noted(notes, note):
                        raise UserError(sentence) from error
                    lost += 1
                    if not was_lost_while_starting(error) or 0 <= max_failures < lost:
                        raise
        except TrainingFailedError as error:
            logger.warning("the last failure:", exc_info=error)
            raise UserError(
                f"the workers failed more often than max_failures {max_failures} allows; what stopped them stands "
                "above, and the same command goes on from the newest checkpoint"
            ) from error
        finally:
            for name in (note, settings.get("stop_note", note)):
                notes.delete(name)


def _fit(trainer: Any, notes: Folder, stop_note: str | None) -> Settings:
    """What rank 0 came back with."""
    if stop_note is None:
        return dict(trainer.fit().return_value)
    with stop_on_signals(lambda: notes.write(stop_note, [b"stop"])) as request:
        outcome = call_in_thread(lambda: dict(trainer.fit().return_value))  # Ray takes Ctrl-C from the main thread
    if "stopped" in outcome:
        stopped = RunStopped(outcome["stopped"])
        stopped.signal_number = request.signal_number or signal.SIGTERM
        raise stopped
    return outcome


def _ray_trainer(
    worker: Callable[[Settings], Settings],
    settings: Settings,
    config: WorkersConfig,
    *,
    use_gpu: bool,
    max_failures: int,
    storage: str,
) -> Any:
    """The TorchTrainer; ``storage`` is a folder of this node alone, as Ray Train keeps no checkpoints of ours."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.cluster.worker_group import LossReporter, WorkerGroupConfig

    fewest, most = worker_range(config.num_workers)
    collective_seconds = getattr(config, "collective_timeout", _COLLECTIVE_SECONDS)
    return TorchTrainer(
        # no train_loop_config: Ray shows that to everyone, and MLflow's address may hold a password
        functools.partial(worker, settings),  # type: ignore[arg-type]  # Ray's type does not know results
        torch_config=WorkerGroupConfig(
            backend=backend_name(use_gpu),
            timeout_s=int(collective_seconds) + 60,  # the trainer's watchdog comes first, and says where
            began=psutil.Process().create_time(),
            deterministic=getattr(config, "deterministic", "off") == "on",
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # Ray Train v2
            num_workers=(fewest, most) if fewest < most else most,  # type: ignore[arg-type]  # Ray Train v2
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=getattr(config, "resize_seconds", 60.0),
        ),
        run_config=RunConfig(
            name=worker.__name__,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[LossReporter()],  # type: ignore[list-item]  # Ray Train v2
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Ray Train v2
        ),
    )


def _ray_train_settings(elastic: bool) -> dict[str, str]:
    """What Ray Train reads from the environment, in the driver, the controller and the workers."""
    return {
        # Until a group has its places; an elastic one then asks again what there is, which is known 20 s late.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8" if elastic else "600",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is noticed within it
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Inside, ``variables`` are set, but for those that are set already."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def pretrain_worker(settings: Settings) -> Settings:
    """One training worker: the trainer with this rank's place."""
    return returning_errors(_pretrain, settings)


def _pretrain(settings: Settings) -> Settings:
    from pipeline.distributed.process_group import init_distributed

    config = PretrainConfig(**settings["config"])
    workers = init_distributed(config.device, deterministic=config.deterministic == "on")
    show_progress(workers.is_rank_zero)
    data, output = open_folder(settings["data"]), open_folder(settings["output"])
    tracker = _tracker(config, settings, output) if workers.is_rank_zero else Tracker()
    notes, stop_note = open_folder(settings["notes"]), settings["stop_note"]
    note_found = StopFileWatcher(lambda: workers.is_rank_zero and notes.size(stop_note) is not None)
    is_told = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
    interruptions = Interruptions(stop_requested=note_found, preemption_pending=_nodes_leaving if is_told else None)
    told = _failure_told(tracker, lambda: notes.size(settings["error_note"]) is not None)
    with contextlib.closing(note_found), told:
        trainer = Trainer(
            config,
            data=data,
            output=output,
            workers=workers,
            tracker=tracker,
            startup=StartupTimer.from_environment(),
            interruptions=interruptions,
        )
        return asdict(trainer.run())


def _nodes_leaving() -> bool:
    """Whether Ray knows that a node of this group is about to be taken away. Collective."""
    from ray import train

    return train.get_preemption_info() is not None


def _tracker(config: PretrainConfig, settings: Settings, output: Folder) -> Tracker:
    """Of rank 0: MLflow and Ray's dashboard."""
    run = MLflowRun(**settings["run"])
    mlflow = MLflowTracker(run, output, registered_model=config.registry_name, sample_system=True)
    return Trackers(mlflow, RayMetrics(output.url.rpartition("/")[2]))


@contextlib.contextmanager
def _failure_told(tracker: Tracker, other_failed: Callable[[], bool]) -> Iterator[None]:
    """A run that ends with a mistake, of this worker or another, is marked so; the next start marks it as running."""
    try:
        with PeerErrorWatcher(other_failed, lambda: tracker.finish("FAILED")):
            yield
    except UserError:
        tracker.finish("FAILED")
        raise
    except RuntimeError:  # of a collective, where another worker left it
        if other_failed():
            tracker.finish("FAILED")
        raise


def returning_errors(action: Callable[[Settings], Settings], settings: Settings) -> Settings:
    """A UserError becomes the result of every worker: Ray Train would restart them, which mends nothing.

    The worker that has it notes it and leaves the process group; the others' collectives then fail, and they find the
    note. Without a note a failed collective means a lost worker, which a restart does mend. Where collectives do not
    fail but wait, the others end (OthersError), and the group that Ray Train starts again finds the note at once.
    """
    notes, note = open_folder(settings["notes"]), settings["error_note"]
    if sentence := _noted(notes, note):
        return {"error": sentence}
    try:
        return {"result": action(settings)}
    except RunStopped as stopped:
        return {"stopped": str(stopped)}
    except UserError as error:
        sentence = str(error)
        with contextlib.suppress(UserError):  # no space for a note either
            notes.write(note, [sentence.encode()])
    except RuntimeError:
        if sentence := _noted(notes, note):
            return {"error": sentence}
        raise
    _leave_process_group()
    return {"error": sentence}


def _leave_process_group() -> None:
    """Connections are closed with the last that holds the group: the network, in the frames of an error now gone."""
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _noted(notes: Folder, note: str) -> str:
    """What a worker has noted of its mistake; empty where none has."""
    try:
        return notes.read(note).decode()
    except FileNotFoundError:
        return ""


def _unwrap(outcome: Settings) -> Settings:
    if "error" in outcome:
        raise UserError(outcome["error"])
    return dict(outcome["result"])


def choose_gpu(config: WorkersConfig) -> bool:
    """Whether the workers get a GPU each. Needs a joined cluster.

    Raises:
        UserError: --device cuda and no GPU in the cluster.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and gpus == 0 and not ray_cluster.autoscales():
        raise UserError(
            "--device cuda was asked for, but the cluster has no GPU; use --device cpu or auto, or add GPU nodes"
        )
    return config.device == "cuda" or (config.device == "auto" and gpus >= worker_range(config.num_workers)[0])


def show_progress(is_first: bool) -> None:
    """Rank 0's progress lines go to the driver's terminal; other ranks are heard only when something is wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO if is_first else logging.WARNING)
