"""One trial at a time, as Ray Tune runs it: a process on the head node that does what jobs/pretrain.py does.

The process takes no CPU. Ray Train starts the workers of the trial from it, and gives them their places all at once or
not at all, so two trials never hold half of the cluster each and wait for the other half. It sits on the head node
because a run's driver does so otherwise: there it survives the loss of any other node, and finds the lock of a run
folder (storage/locks.py).

Tune learns of the val loss from the journal of the run. The trial always ends by itself, with a checkpoint, also where
it is stopped early: by the stop file of its workers (SharedFiles), which the driver of the sweep writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from pipeline.cluster.worker_group import pass_on_address
from pipeline.cluster.workers import SharedFiles
from pipeline.config.training import PretrainConfig
from pipeline.errors import RunStopped, UserError
from pipeline.paths import working_folder
from pipeline.run_files import JOURNAL_FILE
from pipeline.storage.folders import LocalFolder, open_folder
from pipeline.tracking.journal import read_entries
from pipeline.tracking.mlflow_run import mlflow_client, open_run

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}
_REPORT_SECONDS = 5.0  # between two reports of a trial that has no new val loss
_POLL_SECONDS = 1.0
_BUCKET_POLL_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """What the process of a trial needs to know."""

    config: PretrainConfig
    files: SharedFiles
    parent_run: str
    """Id of the sweep's MLflow run."""


class TrialProcess(tune.Trainable):
    """Trains the trial that ``config["trial"]`` names, and after it, in the same process, other ones.

    A report has ``step``, the steps done, and after a validation ``val_loss``. The last one has ``outcome`` (FINISHED,
    STOPPED or FAILED) and, after a failure that a user can mend, its sentence in ``error``.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """A place on the head node, without a CPU."""
        return tune.PlacementGroupFactory([_RESOURCES])

    def setup(  # type: ignore[override]  # Ray Tune adds the arguments of with_parameters
        self, config: dict[str, Any], jobs: Mapping[str, TrialJob], environment: Mapping[str, str]
    ) -> None:
        """Start training; ``environment`` are variables of the sweep's driver."""
        os.environ.update(environment)
        pass_on_address(ray.get_runtime_context().gcs_address)
        self._jobs = jobs
        self._begin(jobs[config["trial"]])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start training the next trial."""
        self._begin(self._jobs[new_config["trial"]])
        return True

    def step(self) -> dict[str, Any]:
        """The next report: at once where there is a new val loss or an end, otherwise after some seconds."""
        deadline = time.monotonic() + _REPORT_SECONDS
        while True:
            has_ended = self._outcome.done()
            self._read_journal()
            if self._points:
                step, val_loss = self._points.popleft()
                return {"step": step, "val_loss": val_loss}
            if has_ended:
                return {"step": self._step, "done": True, **self._outcome.result()}
            if time.monotonic() > deadline:
                return {"step": self._step}
            wait([self._outcome], timeout=self._poll_seconds)

    def _begin(self, job: TrialJob) -> None:
        self._folder = open_folder(job.config.output)
        self._poll_seconds = _POLL_SECONDS if isinstance(self._folder, LocalFolder) else _BUCKET_POLL_SECONDS
        self._points: deque[tuple[int, float]] = deque()
        self._step = self._read = 0
        outcome: Future[dict[str, Any]] = Future()
        self._outcome = outcome

        def work() -> None:
            try:
                outcome.set_result(_train(job))
            except BaseException as error:  # noqa: BLE001  # step() raises it
                outcome.set_exception(error)

        threading.Thread(target=work, name="training", daemon=True).start()

    def _read_journal(self) -> None:
        """Take what the run has logged since the last call, in an earlier life of the trial too."""
        size = self._folder.size(JOURNAL_FILE) or 0
        if size <= self._read:
            return
        content = self._folder.read_range(JOURNAL_FILE, self._read, size)
        content = content[: content.rfind(b"\n") + 1]
        self._read += len(content)
        for entry, _ in read_entries(io.BytesIO(content), 0, len(content)):
            if entry["kind"] != "metrics":
                continue
            if "train/loss" in entry["values"]:
                self._step = max(self._step, entry["step"])
            if "val/loss" in entry["values"]:
                self._points.append((entry["step"], entry["values"]["val/loss"]))


def _train(job: TrialJob) -> dict[str, Any]:
    from pipeline.training import launch  # imports torch

    config = job.config
    if job.files.stop_requested():
        return {"outcome": STOPPED}
    run, output = None, open_folder(config.output)
    try:
        launch.begin_branch(config, data=launch.data_folders(config), output=output)  # MLflow's run names its parent
        run = open_run(
            tracking_uri=config.tracking_uri,
            experiment=config.experiment,
            folder=output,
            working_folder=working_folder(),
            job="pretrain",
            parent=job.parent_run,
        )
        summary, _ = launch.pretrain(config, job.files, shows_progress=False)
    except RunStopped:
        return {"outcome": STOPPED}
    except UserError as error:
        if run is not None:  # a mistake found before training leaves it running
            with contextlib.suppress(Exception):  # the store may be away; the sweep's own files say what failed
                mlflow_client(run.tracking_uri).update_run(run.run_id, status="FAILED")
        return {"outcome": FAILED, "error": str(error)}
    return {"outcome": FINISHED, "step": summary.steps}
