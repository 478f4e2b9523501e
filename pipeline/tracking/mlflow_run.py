"""One MLflow run for each training run, data set and tokenizer; mlflow_run.json in its folder holds the run's id.

A store that does not answer is an error at the very first start only. A run that has an id continues without the store,
because mlflow_tracker.py keeps everything that is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sqlite3
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UserError
from pipeline.paths import submitted
from pipeline.redaction import redact
from pipeline.run_files import MLFLOW_RUN_FILE
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import read_json, write_json
from pipeline.tracking.journal import read_journal
from pipeline.tracking.lineage import Parent, branch_tags, is_copy, last_step, read_parent, write_parent
from pipeline.tracking.store_errors import sqlite_path, trouble_of

logger = logging.getLogger(__name__)

_KEPT_TAGS = ("mlflow.runName", "job", "mlflow.source.name", "mlflow.parentRunId", "mlflow.user")
_VIEW = "gpt25-training"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"  # where MLflow's page keeps a saved view of an experiment's runs
_VIEW_CHARTS = (("train/loss", "val/loss"), ("perf/tokens_per_second",), ("train/lr",), ("train/grad_norm",))
_VIEW_COLUMNS = ("train/loss", "val/loss", "perf/tokens_per_second")
_LOCK_SECONDS = 10  # that a locked sqlite store is waited for; MLflow's client would take two minutes


@dataclass(frozen=True, kw_only=True)
class MLflowRun:
    """Address of one MLflow run, in plain values, so that it can be sent to the worker that logs."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    rollbacks: int = 0
    """Number of rollbacks of the journal that this run comes after: each has begun another run of MLflow."""

    @property
    def view(self) -> str:
        """Address, behind a server's, of the training runs of the experiment as a list with their losses and speed.

        With ``&compareRunsMode=CHART`` behind it, of their curves: train and val loss in one chart.
        """
        return f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={_VIEW}"

    @property
    def location(self) -> str:
        """Address of the run's page, without a password; for a store without pages, how to see the run."""
        address = redact(self.tracking_uri)
        if address.startswith("http"):
            # Without the last part, MLflow 3 shows the page of an experiment with agents.
            return f"{address}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        is_found = self.tracking_uri == mlflow_uri(None, Path.cwd()) and not submitted()  # by make ui, in this folder
        setting = "" if is_found else f"MLFLOW_TRACKING_URI={shlex.quote(address)} "
        return f"run {self.run_id} in {address} ({setting}make ui shows it)"


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
        folder: the output folder of the training run or data set; the MLflow run is named after it and the job.
        working_folder: folder of the sqlite store and its artifacts.
        job: name of the job, for instance "pretrain", which becomes a tag.
        reopen: mark a run that exists as running again.
        parent: id of the run that a new one is shown under.

    Raises:
        UserError: the store does not answer, and no run of it is recorded in ``folder``.
    """
    uri = mlflow_uri(tracking_uri, working_folder)
    _note_copy(folder)
    recorded = _recorded_run(folder, uri, working_folder)
    if uri == mlflow_uri(None, working_folder) and not os.environ.get("MLFLOW_TRACKING_URI"):
        _require_writable(working_folder)
    try:
        client = mlflow_client(uri)
        if recorded is not None and _known_run(client, recorded):
            if reopen:
                client.update_run(recorded.run_id, status="RUNNING")
            write_record(folder, recorded)
            return recorded
        experiment_id = _experiment_id(client, experiment, working_folder)
        name = f"{job} {folder.url.rpartition('/')[2]}"
        tags = {"mlflow.runName": name, "job": job, "mlflow.source.name": f"jobs/{job}.py"}
        run_id = client.create_run(experiment_id, tags=tags | _link(client, folder, parent)).info.run_id
    except mlflow_errors() as error:
        trouble = trouble_of(error, uri)
        if recorded is not None and recorded.experiment_id:
            logger.warning("%s; the run goes on without it", trouble)
            return recorded
        raise UserError(str(trouble)) from error
    rollbacks = sum(entry["kind"] == "rollback" for entry in read_journal(folder))
    run = MLflowRun(tracking_uri=uri, experiment_id=experiment_id, run_id=run_id, rollbacks=rollbacks)
    folder.make()
    write_record(folder, run)
    return run


def write_record(folder: Folder, run: MLflowRun) -> None:
    """Note in ``folder`` which run of MLflow belongs to it."""
    record = asdict(run) | {"tracking_uri": redact(run.tracking_uri), "folder": folder.url}
    if _read_record(folder) != _Record(**record):
        write_json(folder, MLFLOW_RUN_FILE, record)


def current_run(folder: Folder, run: MLflowRun) -> MLflowRun:
    """The run that ``folder`` records now, where a rollback has begun another one since ``run`` was opened."""
    record = _read_record(folder)
    if record is None or (record.tracking_uri, record.folder) != (redact(run.tracking_uri), folder.url):
        return run
    return record.run(run.tracking_uri)


def next_run(client: Any, run: MLflowRun, step: int) -> MLflowRun:
    """The run of MLflow that goes on from step ``step`` of ``run``, after the next rollback; it may exist already."""
    rollbacks = run.rollbacks + 1
    own = {**branch_tags(run.run_id, step), "rollbacks": str(rollbacks)}
    condition = " AND ".join(f"tags.{name} = '{value}'" for name, value in own.items())
    found = client.search_runs([run.experiment_id], filter_string=condition)
    if found:
        run_id = found[0].info.run_id
    else:
        before = client.get_run(run.run_id).data.tags
        kept = {name: before[name] for name in _KEPT_TAGS if name in before}
        run_id = client.create_run(run.experiment_id, tags=kept | own).info.run_id
    return replace(run, run_id=run_id, rollbacks=rollbacks)


def _link(client: Any, folder: Folder, parent: str | None) -> dict[str, str]:
    """The tags that name what a new run belongs to: the run it is shown under, and the one it began from."""
    origin = read_parent(folder)
    shown_under = parent
    if parent is None and origin and origin.run_id and _find(client, origin.run_id):  # else it is another store's
        shown_under = origin.run_id
    tags = origin.tags() if origin else {}
    return tags | ({"mlflow.parentRunId": shown_under} if shown_under else {})


def _note_copy(folder: Folder) -> None:
    """Make a copy of another run's folder a run of its own, which names that one as the run it began from."""
    record = _read_record(folder)
    if record is None or not is_copy(folder, record.folder, record.run_id):
        return
    logger.warning("%s is a copy of %s: it goes on as a run of its own", folder, record.folder)
    write_parent(folder, Parent(folder=record.folder, step=last_step(folder), run_id=record.run_id))
    folder.delete(MLFLOW_RUN_FILE)


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
    recorded = _recorded_run(folder, uri, working_folder)
    known = recorded and _known_run(mlflow_client(uri), recorded)
    return replace(recorded, experiment_id=str(known.info.experiment_id)) if recorded and known else None


def recorded_run_id(folder: Folder) -> str | None:
    """Id of the MLflow run recorded in ``folder``, or None; whether the store knows the run is not checked."""
    record = _read_record(folder)
    return record.run_id if record and not is_copy(folder, record.folder, record.run_id) else None


def mlflow_uri(tracking_uri: str | None, working_folder: Path) -> str:
    """The given store, or else that of MLFLOW_TRACKING_URI, or else sqlite in the working folder.

    A relative path counts from the working folder: other processes of the job run in other folders.
    """
    given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _absolute(given, working_folder) if given else _sqlite_uri(working_folder / "mlflow.db")


def _absolute(uri: str, working_folder: Path) -> str:
    scheme, slashes, rest = uri.partition(":///")
    path, mark, query = rest.partition("?")
    if scheme in ("sqlite", "sqlite+pysqlite") and slashes:
        is_relative = path and not path.startswith(("/", ":memory:", "file:"))
        return _sqlite_uri(working_folder / unquote(path)) + mark + query if is_relative else uri
    path = uri.removeprefix("file:")
    is_path = not path.startswith("/") and ":" not in path and path != "databricks"
    return str(working_folder / Path(path).expanduser()) if is_path else uri


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

    if path := sqlite_path(uri):
        _require_sqlite(Path(path))
    return MlflowClient(tracking_uri=uri)


def _require_sqlite(path: Path) -> None:
    """Make the folder of a sqlite store; sqlite3.Error for a file that cannot be read now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with contextlib.closing(sqlite3.connect(path, timeout=_LOCK_SECONDS)) as database:
            database.execute("SELECT 1 FROM sqlite_master").fetchone()


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the client when a store does not answer or is broken; store_errors.py says what they mean."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    databases = (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, ModuleNotFoundError)
    return (MlflowException, requests.RequestException, *databases, OSError)


def _experiment_id(client: Any, name: str, working_folder: Path) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        _save_view(client, experiment)
        return str(experiment.experiment_id)
    # Without a server, artifacts would land in whatever folder a worker runs in.
    local = not client.tracking_uri.startswith("http")
    location = (working_folder / "mlartifacts").as_uri() if local else None
    with contextlib.suppress(MlflowException):  # another job has created it in the meantime
        client.create_experiment(name, artifact_location=location)
    experiment = client.get_experiment_by_name(name)
    _save_view(client, experiment)
    return str(experiment.experiment_id)


def _save_view(client: Any, experiment: Any) -> None:
    """Add the view "Training" to the views that MLflow's page of an experiment offers, unless it has it."""
    if _VIEW_TAG not in experiment.tags:
        saved = {"name": "Training", "createdAt": 0, "updatedAt": 0, "state": json.dumps(_view_state())}
        with contextlib.suppress(*mlflow_errors()):  # who may not change an experiment goes without
            client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, json.dumps(saved))


def _view_state() -> dict[str, Any]:
    """The state of MLflow 3.17's page: columns, and charts of one metric or several.

    The page of a single run keeps its charts in the browser alone, so none of several metrics can be given to it.
    """
    charts = [
        {
            **{"uuid": f"{_VIEW}-{number}", "type": "LINE", "metricSectionId": _VIEW, "runsCountToCompare": 10},
            **{"metricKey": metrics[0], "selectedMetricKeys": metrics, "deleted": False, "isGenerated": False},
            **{"xAxisKey": "step", "selectedXAxisMetricKey": "", "xAxisScaleType": "linear", "range": {}},
            **{"yAxisKey": "metric", "yAxisExpressions": [], "scaleType": "linear", "ignoreOutliers": False},
            **{"lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True},
        }
        for number, metrics in enumerate(_VIEW_CHARTS)
    ]
    section = {"uuid": _VIEW, "name": "Training", "display": True, "isReordered": False, "columns": 2}
    return {
        "searchFilter": "tags.job = 'pretrain'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{metric}`" for metric in _VIEW_COLUMNS],
        "compareRunCharts": charts,
        "compareRunSections": [section],
        "isAccordionReordered": True,
    }


def _recorded_run(folder: Folder, uri: str, working_folder: Path) -> MLflowRun | None:
    """The run recorded in ``folder`` for this store; older records have no experiment_id, and relative addresses."""
    record = _read_record(folder)
    if record is None or redact(uri) not in (record.tracking_uri, _absolute(record.tracking_uri, working_folder)):
        return None
    return None if is_copy(folder, record.folder, record.run_id) else record.run(uri)


@dataclass(frozen=True, kw_only=True)
class _Record(MLflowRun):
    """The content of mlflow_run.json."""

    experiment_id: str = ""
    folder: str = ""
    """Address of the folder it was written to, so that a copy is noticed."""

    def run(self, uri: str) -> MLflowRun:
        return MLflowRun(
            tracking_uri=uri, experiment_id=self.experiment_id, run_id=self.run_id, rollbacks=self.rollbacks
        )


def _read_record(folder: Folder) -> _Record | None:
    mend = "delete it, and the run goes on as a new one of MLflow"
    return read_json(folder, MLFLOW_RUN_FILE, _Record, mend=mend)


def _known_run(client: Any, recorded: MLflowRun) -> Any | None:
    """The run as the store has it; None where it was deleted. Raises where the store does not answer."""
    run = _find(client, recorded.run_id)
    if run is None:
        logger.warning("MLflow at %s no longer knows run %s", redact(recorded.tracking_uri), recorded.run_id)
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _find(client: Any, run_id: str) -> Any | None:
    """The run, deleted or not; None where the store has none of that id."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
