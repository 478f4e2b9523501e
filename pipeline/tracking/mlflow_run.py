"""One MLflow run per training, data set or tokenizer: found again by the id that its folder notes in mlflow_run.json.

A store that does not answer is an error at the very first start only: a run that has an id goes on without it, because
mlflow_tracker.py keeps what it tells.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.paths import without_password
from pipeline.run_files import MLFLOW_RUN_FILE
from pipeline.storage.folders import Folder

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 160  # of an error's text: urllib3's repeat themselves


@dataclass(frozen=True, kw_only=True)
class MLflowRun:
    """Address of one MLflow run; plain values, so that it travels to the worker that logs."""

    tracking_uri: str
    experiment_id: str
    run_id: str

    @property
    def location(self) -> str:
        """Where a person finds it."""
        address = without_password(self.tracking_uri)
        if address.startswith("http"):
            # Without the last part, MLflow 3 shows the page of an experiment with agents.
            return f"{address}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        return f"run {self.run_id} in {address} (make ui shows it)"


def open_run(
    *, tracking_uri: str | None, experiment: str, folder: Folder, working_folder: Path, job: str, reopen: bool = True
) -> MLflowRun:
    """The MLflow run that belongs to ``folder``: the one noted there, or a new one.

    Args:
        tracking_uri: MLflow server or store; not given: MLFLOW_TRACKING_URI, else sqlite in ``working_folder``.
        folder: the run's (or data set's) output folder, whose name the run gets.
        working_folder: where the sqlite store and its artifacts lie.
        job: the verb, for instance "pretrain"; a tag.
        reopen: mark a noted run as running again.

    Raises:
        UserError: the store does not answer, and ``folder`` notes no run of it.
    """
    uri = mlflow_uri(tracking_uri, working_folder)
    noted = _noted_run(folder, uri)
    try:
        client = mlflow_client(uri)
        if noted is not None and _is_known(client, noted):
            if reopen:
                client.update_run(noted.run_id, status="RUNNING")
            return noted
        experiment_id = _experiment_id(client, experiment, working_folder)
        tags = {"mlflow.runName": folder.url.rpartition("/")[2], "job": job, "mlflow.source.name": f"jobs/{job}.py"}
        run_id = client.create_run(experiment_id, tags=tags).info.run_id
    except mlflow_errors() as error:
        if noted is not None and noted.experiment_id:
            logger.warning("MLflow at %s does not answer; going on without it", without_password(uri))
            return noted
        raise UserError(
            f"MLflow at {without_password(uri)} does not answer ({first_line(error)}); start it, or unset "
            "MLFLOW_TRACKING_URI to track in a file of the working folder"
        ) from error
    run = MLflowRun(tracking_uri=uri, experiment_id=experiment_id, run_id=run_id)
    _note_run(folder, run)
    return run


def find_run(*, tracking_uri: str | None, folder: Folder, working_folder: Path) -> MLflowRun | None:
    """The MLflow run noted in ``folder``, or None."""
    uri = mlflow_uri(tracking_uri, working_folder)
    noted = _noted_run(folder, uri)
    if noted is None or not _is_known(client := mlflow_client(uri), noted):
        return None
    experiment_id = str(client.get_run(noted.run_id).info.experiment_id)
    return MLflowRun(tracking_uri=uri, experiment_id=experiment_id, run_id=noted.run_id)


def noted_run_id(folder: Folder) -> str | None:
    """Id of the MLflow run noted in ``folder``, or None; the store is not asked whether it knows the run."""
    try:
        run_id: str = json.loads(folder.read(MLFLOW_RUN_FILE))["run_id"]
    except FileNotFoundError:
        return None
    return run_id


def mlflow_uri(tracking_uri: str | None, working_folder: Path) -> str:
    """The store that is meant: the given one, MLFLOW_TRACKING_URI, or sqlite in the working folder."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{working_folder / 'mlflow.db'}"


def mlflow_client(uri: str) -> Any:
    """A client that gives up on a dead server within half a minute, MLflow's own within four, and is quiet."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow.store", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every attempt; ours comes once
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """What a store that is away or broken raises."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)


def first_line(error: BaseException) -> str:
    """What an error says, in short and without passwords."""
    text = without_password(next(iter(str(error).splitlines()), type(error).__name__))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _experiment_id(client: Any, name: str, working_folder: Path) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    # Without a server, artifacts would land in whatever folder a worker runs in.
    local = not client.tracking_uri.startswith("http")
    location = (working_folder / "mlartifacts").as_uri() if local else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another job made it in the meantime
        return str(client.get_experiment_by_name(name).experiment_id)


def _note_run(folder: Folder, run: MLflowRun) -> None:
    folder.make()
    note = {
        "tracking_uri": without_password(run.tracking_uri),
        "experiment_id": run.experiment_id,
        "run_id": run.run_id,
    }
    folder.write(MLFLOW_RUN_FILE, [json.dumps(note).encode()])


def _noted_run(folder: Folder, uri: str) -> MLflowRun | None:
    """The run that ``folder`` notes for this store; notes of older versions have no experiment_id."""
    try:
        noted = json.loads(folder.read(MLFLOW_RUN_FILE))
    except FileNotFoundError:
        return None
    if noted["tracking_uri"] != without_password(uri):
        return None
    return MLflowRun(tracking_uri=uri, experiment_id=noted.get("experiment_id", ""), run_id=noted["run_id"])


def _is_known(client: Any, noted: MLflowRun) -> bool:
    """Whether the store has the run; raises where it does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(noted.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("MLflow at %s no longer knows run %s", without_password(noted.tracking_uri), noted.run_id)
        return False
    return bool(run.info.lifecycle_stage == "active")
