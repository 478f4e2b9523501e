"""How Ray Train starts and ends a group of workers, which form a process group of torch.

Ray's own torch backend does the work. Added are time marks, so that a recovery can report its parts; imports, which run
in all workers at once before they connect; a rendezvous on one address alone (rendezvous.py); and a shutdown that does
not wait for a process that will not answer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
)

from pipeline.cluster import rendezvous
from pipeline.cluster.waiting import WaitingReporter, describe_places
from pipeline.distributed import determinism
from pipeline.distributed.startup_timer import StartupTimer
from pipeline.log_files import keep_log
from pipeline.storage.folders import open_folder

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5
_MOST_FAILED_JOINS = 5  # in a row; then it is no accident
_LINES_OF_WORKERS = "ray_print_logs"  # the name of Ray's handler that shows them in the driver


@dataclass
class WorkerGroupConfig(TorchConfig):
    """The TorchConfig of Ray Train with the backend below."""

    began: float = 0.0
    """The time.time() at which the job began."""
    deterministic: bool = False
    """Whether sums over workers must give the same bits at every start (distributed/determinism.py)."""
    worker_module: str = ""
    """Module of the function that the workers will run; they import it while the group starts."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _WorkerGroupBackend


class _WorkerGroupBackend(_TorchBackend):
    """Lives in the controller for the whole run, over all groups of workers."""

    def __init__(self) -> None:
        super().__init__()
        self._timer: StartupTimer | None = None
        self._failed_joins = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        timer = copy.deepcopy(self._timer) or StartupTimer(backend_config.began)
        timer.mark("processes")
        try:
            worker_group.execute(_import_module, backend_config.worker_module)
            if backend_config.deterministic:
                worker_group.execute(determinism.set_environment)
            timer.mark("imports")
            self._join(worker_group, backend_config)
            timer.mark("process group")
            worker_group.execute(timer.export)
        except BaseException:
            # Ray Train itself does so only for errors before this point: the resources of the workers would stay taken,
            # and the next group would wait for them for ever.
            worker_group.shutdown()
            raise

    def _join(self, worker_group: Any, backend_config: Any) -> None:
        """Connect the workers. If one was killed meanwhile, the others do not find it, and Ray Train tries again."""
        try:
            _connect(worker_group, backend_config)
        except RayTaskError as error:
            self._failed_joins += 1
            if self._failed_joins > _MOST_FAILED_JOINS:
                raise
            raise WorkerGroupStartupFailedError("the workers did not find each other") from error
        self._failed_joins = 0

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        timer = StartupTimer(again=True)
        # Ray would wait half a minute for processes that it kills right after anyway.
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(_SHUTDOWN_SECONDS))
        with contextlib.suppress(RayActorError, RayTaskError):  # of dead workers; Ray would log a page for each
            super().on_shutdown(worker_group, backend_config)
        timer.mark("shutdown")
        self._timer = timer


def _connect(worker_group: Any, config: WorkerGroupConfig) -> None:
    """Make one process group of the workers; Ray's own version has a store that listens on every network."""
    address = worker_group.execute_single(0, ray.util.get_node_ip_address)
    port = worker_group.execute_single(0, rendezvous.serve, address)
    worker_group.execute(rendezvous.set_environment, address, port)
    worker_group.execute(_set_torch_distributed_env_vars)
    joins = [
        worker_group.execute_single_async(
            rank,
            _setup_torch_process_group,
            backend=config.backend,
            world_rank=rank,
            world_size=len(worker_group),
            init_method="env://",
            timeout_s=config.timeout_s,
        )
        for rank in range(len(worker_group))
    ]
    ray.get(joins)


def pass_on_address(address: str) -> None:
    """Tell Ray Train's own processes which cluster they belong to, where this process may be killed.

    Then Ray Train frees the places of its workers. The process that does so asks the cluster's dashboard, and does not
    find it by itself where several clusters run on one machine.

    Args:
        address: the address of the cluster that this process has joined, HOST:PORT.
    """
    os.environ.setdefault("RAY_ADDRESS", address)
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def hide_cleaner() -> None:
    """Keep the lines of Ray Train's PlacementGroupCleaner off this terminal: it prints its crash at the end."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    show = dict(dispatcher.handlers).get(_LINES_OF_WORKERS)
    if show is not None:
        dispatcher.remove_handler(_LINES_OF_WORKERS)
        dispatcher.add_handler(
            _LINES_OF_WORKERS,
            lambda lines: None if lines.get("actor_name") == "PlacementGroupCleaner" else show(lines),
        )


def _import_module(name: str) -> None:
    """Import a module in a worker; the module itself could not be sent back."""
    importlib.import_module(name)


def was_lost_while_starting(error: TrainingFailedError) -> bool:
    """Whether Ray Train gave up because a worker died just when it was given its work."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


class ControllerLog(ControllerCallback):
    """Lives in the controller: keeps its log, and says every minute what it waits for while no group runs.

    Args:
        num_workers: the fewest workers of a group.
        resources: what each worker takes, such as {"GPU": 1}.
        logs: address of the folder for log files; empty for none.
    """

    def __init__(self, *, num_workers: int, resources: dict[str, float], logs: str) -> None:
        self._num_workers, self._resources, self._logs = num_workers, resources, logs
        self._ends = contextlib.ExitStack()

    def after_controller_start(self, train_run_context: Any) -> None:
        if self._logs:
            self._ends.enter_context(keep_log(open_folder(self._logs), "controller"))
        self._waiting = WaitingReporter(functools.partial(describe_places, self._num_workers, self._resources))
        self._ends.callback(self._waiting.end)
        self._waiting.begin()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, SchedulingState | ReschedulingState | RestartingState | ResizingState):
            self._waiting.begin()
        else:
            self._waiting.end()

    async def before_controller_shutdown(self) -> None:
        self._ends.close()

    def before_controller_abort(self) -> None:
        self._ends.close()


class LostWorkerLogger(UserCallback):
    """Logs in one line which worker was lost; the log of Ray Train itself is off."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        dead = [rank for rank, error in worker_exceptions.items() if isinstance(error, WorkerHealthCheckFailedError)]
        if dead:
            logger.warning("lost: worker %s; all start again from the newest checkpoint", ", ".join(map(str, dead)))
            return
        rank, error = next(iter(worker_exceptions.items()))
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]
        if "Connection" in reason:  # the long message of torch about a lost peer
            logger.warning(
                "lost: a worker that worker %d was connected to; all start again from the newest checkpoint", rank
            )
        else:
            logger.warning("worker %d failed (%s); all start again from the newest checkpoint", rank, reason)
