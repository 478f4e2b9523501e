"""Runs a function on a group of workers: Ray Train starts them, restarts the group after a loss, returns the result.
A group of one on the CPU of this machine is this process itself, and needs no Ray.

Ray Train restarts a group after any exception, and cannot send a message to running workers. So errors of the user and
requests to stop travel through two files in a folder that all workers see (SharedFiles). Checkpoints are not Ray
Train's: the trainer writes its own into that folder, where a restarted group or the same command finds the newest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import re
import signal
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from pipeline.cluster import ray_cluster
from pipeline.config.training import worker_range
from pipeline.console import log_plainly
from pipeline.distributed.process_group import backend_name
from pipeline.distributed.signals import GivenUp, StopRequest, call_in_thread, stop_on_signals
from pipeline.errors import PROGRAM_ERRORS, RunStopped, UserError
from pipeline.log_files import LogFile, keep_log
from pipeline.storage.folders import Folder, open_folder

logger = logging.getLogger(__name__)

_SHARED_FILE = re.compile(r"(begun|stop)-[0-9a-f]{32}")

SettingsT = TypeVar("SettingsT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """How a group of workers is run."""

    num_workers: int | str
    """Number of workers, or a range such as 2:8 for an elastic group."""
    device: str
    """One of auto, cpu and cuda; auto takes GPUs if every worker can have one."""
    max_failures: int = 0
    """Number of times that the group may be lost and started again; -1 for any number."""
    collective_timeout: float = 600.0
    """Seconds that workers wait for each other."""
    deterministic: bool = False
    """Whether sums over workers must give the same bits at every start."""
    resize_seconds: float = 60.0
    """Seconds between two attempts to add workers to an elastic group."""
    stop_on_signals: bool = False
    """Whether SIGTERM and Ctrl-C ask the workers to stop, through the stop file."""
    logs: str = ""
    """Address of the folder for the logs of workers and controller; empty keeps none."""


@dataclass(frozen=True, kw_only=True)
class SharedFiles:
    """Files by which workers and driver tell each other of an error, of a request to stop, and of work to save."""

    folder: str
    """A folder that all workers see."""
    error_file: str = field(default_factory=lambda: f"error-{uuid.uuid4().hex}")
    """Name of the file that holds the UserError of a worker."""
    stop_file: str = field(default_factory=lambda: f"stop-{uuid.uuid4().hex}")
    """Name of the file that asks the workers to stop."""
    begun_file: str = field(default_factory=lambda: f"begun-{uuid.uuid4().hex}")
    """Name of the file that is there while a group has done work of which a request to stop saves something."""

    def has_error(self) -> bool:
        return open_folder(self.folder).size(self.error_file) is not None

    def read_error(self) -> str:
        """The error of a worker; empty if there is none."""
        try:
            return open_folder(self.folder).read(self.error_file).decode()
        except FileNotFoundError:
            return ""

    def write_error(self, sentence: str) -> None:
        open_folder(self.folder).write(self.error_file, [sentence.encode()])

    def stop_requested(self) -> bool:
        return open_folder(self.folder).size(self.stop_file) is not None

    def request_stop(self) -> None:
        open_folder(self.folder).write(self.stop_file, [b"stop"])

    def has_begun(self) -> bool:
        return open_folder(self.folder).size(self.begun_file) is not None

    def write_begun(self) -> None:
        open_folder(self.folder).write(self.begun_file, [b"begun"])

    def delete_begun(self) -> None:
        open_folder(self.folder).delete(self.begun_file)

    def delete_of_killed(self) -> None:
        """Delete such files of drivers that were killed; the caller holds the folder."""
        own = {self.error_file, self.stop_file, self.begun_file}
        folder = open_folder(self.folder)
        for name in (name for prefix in ("begun-", "stop-") for name in folder.names(prefix)):
            if _SHARED_FILE.fullmatch(name) and name not in own:
                folder.delete(name)

    def delete(self) -> None:
        for name in (self.error_file, self.stop_file, self.begun_file):
            open_folder(self.folder).delete(name)


@dataclass(frozen=True, kw_only=True)
class WorkerOutcome:
    """How a worker ended: with a result, a UserError, or because it was asked to stop."""

    result: Any = None
    error: str = ""
    stopped: str = ""


Worker = Callable[[SettingsT, SharedFiles], ResultT]
"""A function for workers. It has to be importable, and gets its settings and the shared files."""


def run_workers(
    worker: Worker[SettingsT, ResultT],
    settings: SettingsT,
    group: GroupSettings,
    folder: Folder,
    files: SharedFiles | None = None,
) -> ResultT:
    """Run ``worker`` on all workers of one process group; returns the result of rank 0.

    Args:
        folder: a folder that every worker sees, for the shared files.
        files: the shared files, where another process is to ask the workers to stop.

    Raises:
        UserError: raised by a worker, or the cluster cannot hold the workers, or they fail too often.
        RunStopped: the workers were asked to stop, and did.
    """
    fewest, most = worker_range(group.num_workers)
    ray_cluster.require_device(group.device)
    ray_cluster.connect(num_cpus=max(fewest, os.cpu_count() or 1))
    use_gpu = choose_gpu(group)
    ray_cluster.require(num_workers=fewest, gpus=use_gpu)
    files = files or SharedFiles(folder=str(folder))
    logger.info("starting %s worker%s: processes, then torch, then the network", most, "s" if most > 1 else "")
    with _environment(_ray_train_settings(elastic=fewest < most)), _own_cluster():
        try:
            outcome = _fit_until_done(worker, settings, group, files, use_gpu=use_gpu)
        finally:
            files.delete()
    return _result_of(outcome)


def run_in_process(
    worker: Worker[SettingsT, ResultT], settings: SettingsT, group: GroupSettings, files: SharedFiles
) -> ResultT:
    """Run ``worker`` in this process, as the only one of its group; returns its result.

    Nothing starts it again after an error that is not the user's: the same command does.

    Raises:
        UserError: raised by the worker, or an error of the program itself.
        RunStopped: the worker was asked to stop, and did.
    """
    try:
        return _result_of(_fit(functools.partial(_run_worker, worker, settings, files, group.logs), group, files))
    finally:
        files.delete()


def fits_this_process(group: GroupSettings) -> bool:
    """Whether the group is one worker on a CPU of this machine; in a cluster, Ray chooses the machine."""
    on_cpu = group.device == "cpu" or (group.device == "auto" and not torch.cuda.is_available())
    return worker_range(group.num_workers) == (1, 1) and on_cpu and not ray_cluster.named_by_environment()


def _result_of(outcome: WorkerOutcome) -> Any:
    if outcome.error:
        raise UserError(outcome.error)
    return outcome.result


def _fit_until_done(
    worker: Worker[SettingsT, Any], settings: SettingsT, group: GroupSettings, files: SharedFiles, *, use_gpu: bool
) -> WorkerOutcome:
    """Ray Train counts the losses, but for a worker lost in the moment when it gets its work; those count here."""
    from ray.train import TrainingFailedError

    from pipeline.cluster.worker_group import was_lost_while_starting

    losses = 0
    with tempfile.TemporaryDirectory(prefix="gpt25-", ignore_cleanup_errors=True) as storage:
        trainer = functools.partial(_ray_trainer, worker, settings, group, files, use_gpu=use_gpu, storage=storage)
        while True:
            try:
                return _fit(lambda: trainer().fit().return_value, group, files)
            except TrainingFailedError as error:
                if sentence := files.read_error():
                    raise UserError(sentence) from error
                losses += 1
                if was_lost_while_starting(error) and not 0 <= group.max_failures < losses:
                    continue
                logger.warning("the last failure:", exc_info=error)
                raise UserError(
                    f"the workers failed more often than max_failures {group.max_failures} allows; what stopped them "
                    "stands above, and the same command goes on from the newest checkpoint"
                ) from error


def _fit(fit: Callable[[], WorkerOutcome], group: GroupSettings, files: SharedFiles) -> WorkerOutcome:
    """The outcome of rank 0, which ``fit`` returns; signals meanwhile ask the workers to stop."""
    if not group.stop_on_signals:
        return call_in_thread(fit)  # in the main thread Ray would take Ctrl-C
    with stop_on_signals(files.request_stop) as request:
        try:
            outcome = call_in_thread(fit, give_up=lambda: request() and not files.has_begun())
        except GivenUp:
            sentence = "stopped before the workers had begun; the same command goes on from the newest checkpoint"
            raise stopped(sentence, request, at_once=True) from None
    if outcome.stopped:
        raise stopped(outcome.stopped, request)
    return outcome


def stopped(sentence: str, request: StopRequest, *, at_once: bool = False) -> RunStopped:
    """The RunStopped to raise where ``request`` has ended the work."""
    error = RunStopped(sentence)
    error.signal_number, error.at_once = request.signal_number or signal.SIGTERM, at_once
    return error


def _ray_trainer(
    worker: Worker[SettingsT, Any],
    settings: SettingsT,
    group: GroupSettings,
    files: SharedFiles,
    *,
    use_gpu: bool,
    storage: str,
) -> Any:
    """The TorchTrainer; ``storage`` is a folder of this node alone, as Ray Train keeps no checkpoints of ours."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.cluster.worker_group import ControllerLog, LostWorkerLogger, WorkerGroupConfig

    fewest, most = worker_range(group.num_workers)
    resources = {"GPU" if use_gpu else "CPU": 1.0}
    callbacks: Any = [  # Ray Train v2
        LostWorkerLogger(),
        ControllerLog(num_workers=fewest, resources=resources, logs=group.logs),
    ]
    return TorchTrainer(
        # no train_loop_config: Ray shows that to everyone, and MLflow's address may hold a password
        functools.partial(_run_worker, worker, settings, files, group.logs),  # type: ignore[arg-type]  # Ray knows no results
        torch_config=WorkerGroupConfig(
            backend=backend_name(use_gpu),
            timeout_s=int(group.collective_timeout) + 60,  # the watchdog of the trainer comes first, and says where
            began=psutil.Process().create_time(),
            deterministic=group.deterministic,
            worker_module=worker.__module__,
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # Ray Train v2
            num_workers=(fewest, most) if fewest < most else most,  # type: ignore[arg-type]  # Ray Train v2
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=group.resize_seconds,
        ),
        run_config=RunConfig(
            name=worker.__name__,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=group.max_failures),
            callbacks=callbacks,
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]  # waiting.py warns better
        ),
    )


def _ray_train_settings(*, elastic: bool) -> dict[str, str]:
    """Environment variables that Ray Train reads in the driver, the controller and the workers."""
    return {
        # Seconds until a group has its places; an elastic one then asks again for its size, known only 20 s late.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8" if elastic else "600",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is noticed within it
    }


@contextlib.contextmanager
def _own_cluster() -> Iterator[None]:
    """A context in which Ray Train's own processes know the joined cluster, where several run on one machine."""
    import ray

    from pipeline.cluster.worker_group import hide_cleaner, pass_on_address

    address = ray.get_runtime_context().gcs_address
    with _environment({"RAY_ADDRESS": address}):
        pass_on_address(address)
        hide_cleaner()
        yield


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """A context in which ``variables`` are set, except those that are set already."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _run_worker(
    worker: Worker[SettingsT, Any], settings: SettingsT, files: SharedFiles, logs: str = ""
) -> WorkerOutcome:
    """Runs in every worker. A UserError becomes its outcome: Ray Train would restart the group, which mends nothing.
    So does an error of the program itself, which would come again at the same step.

    The worker with the error writes the error file and leaves the process group. The collectives of the others then
    fail, and they find the file; without it a failed collective means a lost worker, which a restart does mend. Where
    collectives wait instead of failing, the others end (end_after_peer_error), and the next group finds the file.
    """
    if sentence := files.read_error():
        return WorkerOutcome(error=sentence)
    try:
        with _log_kept(logs):
            return WorkerOutcome(result=worker(settings, files))
    except RunStopped as error:
        return WorkerOutcome(stopped=str(error))
    except (UserError, *PROGRAM_ERRORS) as error:
        sentence = str(error) if isinstance(error, UserError) else _explained(error)
        with contextlib.suppress(UserError):  # there may be no space for this file either
            files.write_error(sentence)
    except RuntimeError:
        if sentence := files.read_error():
            return WorkerOutcome(error=sentence)
        raise
    _leave_process_group()
    return WorkerOutcome(error=sentence)


def _explained(error: Exception) -> str:
    """One sentence about an error of the program; the log of the worker has the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in frames]
    what = " ".join(str(error).split()) or "no further words"
    return (
        f"a worker cannot go on: {type(error).__name__}: {what} ({places[-1]}); a new start would end in the same way, "
        "so none was tried: change the setting or the data that it names, or report it"
    )


def _log_kept(logs: str) -> contextlib.AbstractContextManager[None]:
    """A context in which this worker's log is kept in the folder at ``logs``, under its rank; empty keeps none."""
    if not logs:
        return contextlib.nullcontext()
    has_own_output = "RANK" in os.environ  # else this is the job's process, whose output may be a file of the user's
    rank = int(os.environ.get("RANK", "0"))
    return keep_log(open_folder(logs), f"rank-{rank:03d}", with_output=has_own_output)


def _leave_process_group() -> None:
    """Close the connections. The network holds the group too; it goes with the frames of the error, collected here."""
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_gpu(group: GroupSettings) -> bool:
    """Whether every worker gets a GPU; UserError for --device cuda without any. Needs a joined cluster."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if group.device == "cuda" and gpus == 0 and not ray_cluster.autoscales():
        raise UserError(
            "--device cuda was asked for, but the cluster has no GPU; use --device cpu or auto, or add GPU nodes"
        )
    return group.device == "cuda" or (group.device == "auto" and gpus >= worker_range(group.num_workers)[0])


def show_progress(is_rank_zero: bool) -> None:
    """Send the progress lines of rank 0 to the terminal of the driver; of other ranks it gets warnings only."""
    log_plainly()
    logging.getLogger("pipeline").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, LogFile):
            handler.setLevel(logging.NOTSET if is_rank_zero else logging.WARNING)
