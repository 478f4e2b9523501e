"""One MLflow run for each training run, data set and tokenizer; mlflow_run.json in its folder holds the run's id.

A store that does not answer is an error at the very first start only. A run that has an id continues without the store,
because mlflow_tracker.py keeps everything that is logged.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UserError
from pipeline.redaction import redact
from pipeline.run_files import MLFLOW_RUN_FILE
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import read_json, write_json

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 160  # of an error message; those of urllib3 repeat themselves


@dataclass(frozen=True, kw_only=True)
class MLflowRun:
    """Address of one MLflow run, in plain values, so that it can be sent to the worker that logs."""

    tracking_uri: str
    experiment_id: str
    run_id: str

    @property
    def location(self) -> str:
        """Address of the run's page, without a password; for a store without pages, how to see the run."""
        address = redact(self.tracking_uri)
        if address.startswith("http"):
            # Without the last part, MLflow 3 shows the page of an experiment with agents.
            return f"{address}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        return f"run {self.run_id} in {address} (make ui shows it)"


def open_run(
    *,
    tracking_uri: str | None,
    experiment: str,
    folder: Folder,
    working_folder: Path,
    job: str,
    reopen: bool = True,
    parent: str | None = None,
) -> MLflowRun:
    """The MLflow run that belongs to ``folder``: the one recorded in mlflow_run.json, or a new one.

    Args:
        tracking_uri: MLflow server or store; by default MLFLOW_TRACKING_URI, or sqlite in ``working_folder``.
        folder: the output folder of the training run or data set; the MLflow run is named after it.
        working_folder: folder of the sqlite store and its artifacts.
        job: name of the job, for instance "pretrain", which becomes a tag.
        reopen: mark a run that exists as running again.
        parent: id of the run that a new one is shown under.

    Raises:
        UserError: the store does not answer, and no run of it is recorded in ``folder``.
    """
    uri = mlflow_uri(tracking_uri, working_folder)
    recorded = _recorded_run(folder, uri)
    if uri == mlflow_uri(None, working_folder) and not os.environ.get("MLFLOW_TRACKING_URI"):
        _require_writable(working_folder)
    try:
        client = mlflow_client(uri)
        if recorded is not None and _known_run(client, recorded):
            if reopen:
                client.update_run(recorded.run_id, status="RUNNING")
            return recorded
        experiment_id = _experiment_id(client, experiment, working_folder)
        tags = {"mlflow.runName": folder.url.rpartition("/")[2], "job": job, "mlflow.source.name": f"jobs/{job}.py"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        run_id = client.create_run(experiment_id, tags=tags).info.run_id
    except mlflow_errors() as error:
        if recorded is not None and recorded.experiment_id:
            logger.warning("MLflow at %s does not answer; going on without it", redact(uri))
            return recorded
        raise UserError(
            f"MLflow at {redact(uri)} does not answer ({first_line(error)}); start it, or unset "
            "MLFLOW_TRACKING_URI to track in a file of the working folder"
        ) from error
    run = MLflowRun(tracking_uri=uri, experiment_id=experiment_id, run_id=run_id)
    folder.make()
    write_json(folder, MLFLOW_RUN_FILE, asdict(run) | {"tracking_uri": redact(uri)})
    return run


def _require_writable(working_folder: Path) -> None:
    """UserError where the embedded store cannot be; sqlite would be tried for two minutes."""
    try:
        working_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=working_folder):
            pass
    except OSError as error:
        raise UserError(
            f"the working folder {working_folder}, where MLflow's mlflow.db would be, cannot be written "
            f"({error.strerror}); start in another folder, or name a store with --tracking_uri"
        ) from error


def find_run(*, tracking_uri: str | None, folder: Folder, working_folder: Path) -> MLflowRun | None:
    """The MLflow run recorded in ``folder``; None where there is none, or where the store does not know it."""
    uri = mlflow_uri(tracking_uri, working_folder)
    recorded = _recorded_run(folder, uri)
    known = recorded and _known_run(mlflow_client(uri), recorded)
    return replace(recorded, experiment_id=str(known.info.experiment_id)) if recorded and known else None


def recorded_run_id(folder: Folder) -> str | None:
    """Id of the MLflow run recorded in ``folder``, or None; whether the store knows the run is not checked."""
    recorded = _read_record(folder)
    return recorded.run_id if recorded else None


def mlflow_uri(tracking_uri: str | None, working_folder: Path) -> str:
    """The given store, or else that of MLFLOW_TRACKING_URI, or else sqlite in the working folder."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(working_folder / "mlflow.db")


def _sqlite_uri(path: Path) -> str:
    """The address of a sqlite store: SQLAlchemy decodes %, and MLflow, which does not, makes no folder for pysqlite."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return f"sqlite:///{path}" if quoted == str(path) else f"sqlite+pysqlite:///{quoted}"


def mlflow_client(uri: str) -> Any:
    """A client that reports an unreachable server within half a minute (MLflow's default: four), without log output."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow.store", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns at every attempt
    from mlflow import MlflowClient

    scheme, _, path = uri.partition(":///")
    if scheme in ("sqlite", "sqlite+pysqlite"):
        Path(unquote(path.partition("?")[0])).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the client when a store does not answer or is broken."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)


def first_line(error: BaseException) -> str:
    """The first line of an error message, shortened and without passwords."""
    text = redact(next(iter(str(error).splitlines()), type(error).__name__))
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
    except MlflowException:  # another job has created it in the meantime
        return str(client.get_experiment_by_name(name).experiment_id)


def _recorded_run(folder: Folder, uri: str) -> MLflowRun | None:
    """The run recorded in ``folder`` for this store; older records have no experiment_id."""
    recorded = _read_record(folder)
    if recorded is None or recorded.tracking_uri != redact(uri):
        return None
    return replace(recorded, tracking_uri=uri)


@dataclass(frozen=True, kw_only=True)
class _Record(MLflowRun):
    """The content of mlflow_run.json."""

    experiment_id: str = ""


def _read_record(folder: Folder) -> MLflowRun | None:
    mend = "delete it, and the run goes on as a new one of MLflow"
    record = read_json(folder, MLFLOW_RUN_FILE, _Record, mend=mend)
    return MLflowRun(**asdict(record)) if record else None


def _known_run(client: Any, recorded: MLflowRun) -> Any | None:
    """The run as the store has it; None where it was deleted. Raises where the store does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(recorded.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("MLflow at %s no longer knows run %s", redact(recorded.tracking_uri), recorded.run_id)
        return None
    return run if run.info.lifecycle_stage == "active" else None
