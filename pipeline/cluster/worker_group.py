"""How Ray Train starts a group of workers and ends it: torch's process group, with what is ours around it.

Ray's own torch backend does the work. Added are stamps of time, so that a recovery can say what it cost; imports that
run in all workers at once, before they meet; and an end that does not wait for a process that will not answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

from pipeline.distributed import determinism, startup_timer

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 5
_MOST_FAILED_JOINS = 5  # in a row; then it is no accident


@dataclass
class WorkerGroupConfig(TorchConfig):
    """TorchConfig with the backend below."""

    began: float = 0.0
    """time.time() when the job began."""
    deterministic: bool = False
    """Sums over workers are to give the same bits at every start (distributed/determinism.py)."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _WorkerGroupBackend


class _WorkerGroupBackend(_TorchBackend):
    """Lives in the controller for the whole run, through every group of workers."""

    def __init__(self) -> None:
        super().__init__()
        self._stamps: list[tuple[str, float]] = []
        self._failed_joins = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        again = bool(self._stamps)
        stamps = [*(self._stamps or [("", backend_config.began)]), ("processes", time.time())]
        with _cleared_away(worker_group):
            worker_group.execute(load_libraries)
            if backend_config.deterministic:
                worker_group.execute(determinism.set_environment)
            stamps.append(("imports", time.time()))
            self._join(worker_group, backend_config)
            stamps.append(("process group", time.time()))
            worker_group.execute(startup_timer.export_marks, stamps, again)

    def _join(self, worker_group: Any, backend_config: Any) -> None:
        """A worker may miss the others because one of them was killed meanwhile: Ray Train then tries again."""
        try:
            super().on_start(worker_group, backend_config)
        except RayTaskError as error:
            self._failed_joins += 1
            if self._failed_joins > _MOST_FAILED_JOINS:
                raise
            raise WorkerGroupStartupFailedError("the workers did not find each other") from error
        self._failed_joins = 0

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        noticed = time.time()
        # Half a minute is Ray's patience with processes that are killed right after, whatever they answer.
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(_SHUTDOWN_SECONDS))
        with contextlib.suppress(RayActorError, RayTaskError):  # of the dead; Ray would log a page for each
            super().on_shutdown(worker_group, backend_config)
        self._stamps = [("", noticed), ("shutdown", time.time())]


@contextlib.contextmanager
def _cleared_away(worker_group: Any) -> Iterator[None]:
    """A group that fails inside leaves nothing behind.

    Ray Train clears away only what has not come as far as this: the workers' places would stay taken, and the next
    group would wait for them for ever.
    """
    try:
        yield
    except BaseException:
        worker_group.shutdown()
        raise


def load_libraries() -> None:
    """Import everything that training takes, in a worker whose group is being started."""
    import pipeline.training.launch  # noqa: F401


def was_lost_while_starting(error: TrainingFailedError) -> bool:
    """Whether Ray Train gave up because a worker died in the moment when it was given its work."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


class LossReporter(UserCallback):
    """Says in the job's log that workers are lost, and which; Ray Train itself is kept quiet."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        dead = [rank for rank, error in worker_exceptions.items() if isinstance(error, WorkerHealthCheckFailedError)]
        if dead:
            logger.warning("lost: worker %s; all start again from the newest checkpoint", ", ".join(map(str, dead)))
            return
        rank, error = next(iter(worker_exceptions.items()))
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]
        if "Connection" in reason:  # what torch says of a peer that is gone, at length
            logger.warning(
                "lost: a worker that worker %d was connected to; all start again from the newest checkpoint", rank
            )
        else:
            logger.warning("worker %d failed (%s); all start again from the newest checkpoint", rank, reason)
