"""Where a run's settings, metrics, inputs, checkpoints and samples go: MLflow, or memory.

The trainer sees the Tracker protocol only. A run keeps its MLflow run id in ``<run>/mlflow_run.json``, so a restarted
run goes on in its own MLflow run; a point whose step was logged before the restart is not logged again. Metrics are
buffered and sent in batches, off most steps; they are durable after ``flush``, which the trainer calls before each
checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.config import without_password
from pipeline.errors import UserError
from pipeline.storage import Folder

logger = logging.getLogger(__name__)

_NOTE = "mlflow_run.json"
_FLUSH_SECONDS = 5.0
_MAX_BATCH = 1000  # MLflow's limit of metrics per request
_MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
_DIGEST_CHARACTERS = 36  # MLflow's limit of a data set digest


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """Something the run was made from: a data set or a tokenizer."""

    name: str
    fingerprint: str
    """sha256, hex."""
    source: str
    """Path or address."""
    context: str
    """What for: training, validation, tokenizer."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Figures about it, for instance tokens and documents."""


class Tracker(Protocol):
    """What a run tells the outside."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_inputs(self, inputs: Sequence[RunInput]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_sample(self, step: int, prompt: str, text: str) -> None: ...

    def log_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None: ...

    def log_file(self, path: Path) -> None: ...

    def flush(self) -> None: ...

    def finish(self, status: Literal["FINISHED", "FAILED"]) -> None: ...


class MemoryTracker:
    """Keeps everything in attributes: for tests, and for runs where MLflow is not installed."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.inputs: list[RunInput] = []
        self.metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.samples: list[tuple[int, str, str]] = []
        self.checkpoints: list[tuple[int, Path]] = []
        self.files: list[Path] = []
        self.status: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params.update(params)

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        self.inputs.extend(inputs)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.metrics[name].append((step, value))

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        self.samples.append((step, prompt, text))

    def log_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        self.checkpoints.append((step, path))

    def log_file(self, path: Path) -> None:
        self.files.append(path)

    def flush(self) -> None:
        pass

    def finish(self, status: Literal["FINISHED", "FAILED"]) -> None:
        self.status = status


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
            return f"{address}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
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
        UserError: the store does not answer.
    """
    uri = mlflow_uri(tracking_uri, working_folder)
    try:
        client = _client(uri)
        experiment_id = _experiment_id(client, experiment, working_folder)
        run_id = _noted_run_id(client, folder, uri)
        if run_id is None:
            tags = {"mlflow.runName": folder.url.rpartition("/")[2], "job": job, "mlflow.source.name": f"jobs/{job}.py"}
            run_id = client.create_run(experiment_id, tags=tags).info.run_id
            _note_run_id(folder, uri, run_id)
        elif reopen:
            client.update_run(run_id, status="RUNNING")
    except mlflow_errors() as error:
        raise UserError(
            f"MLflow at {without_password(uri)} does not answer ({_first_line(error)}); start it, or unset "
            "MLFLOW_TRACKING_URI to track in a file of the working folder"
        ) from error
    return MLflowRun(tracking_uri=uri, experiment_id=experiment_id, run_id=run_id)


def find_run(*, tracking_uri: str | None, folder: Folder, working_folder: Path) -> MLflowRun | None:
    """The MLflow run noted in ``folder``, or None."""
    uri = mlflow_uri(tracking_uri, working_folder)
    client = _client(uri)
    run_id = _noted_run_id(client, folder, uri)
    if run_id is None:
        return None
    return MLflowRun(tracking_uri=uri, experiment_id=client.get_run(run_id).info.experiment_id, run_id=run_id)


class MLflowTracker:
    """Logs to one MLflow run. An unreachable server costs a warning and a delay, never the run."""

    def __init__(self, run: MLflowRun) -> None:
        self.run = run
        self._client = _client(run.tracking_uri)
        self._buffer: list[Any] = []
        self._last_step: dict[str, int] = {}
        self._last_flush = time.monotonic()

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        values = {name: str(value)[:_MAX_PARAM_CHARACTERS] for name, value in params.items()}
        logged: dict[str, str] = {}
        self._guarded("params", lambda: logged.update(self._client.get_run(self.run.run_id).data.params))
        changed = {name: value for name, value in values.items() if name in logged and logged[name] != value}
        new = [Param(name, value) for name, value in values.items() if name not in logged]
        self._guarded("params", lambda: self._client.log_batch(self.run.run_id, params=new))
        for name, value in changed.items():  # MLflow's params cannot change; a resumed run's may (--train_steps)
            self._guarded("params", lambda n=name, v=value: self._client.set_tag(self.run.run_id, f"resumed.{n}", v))

    def log_inputs(self, inputs: Sequence[RunInput]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [
            DatasetInput(
                dataset=Dataset(
                    name=item.name,
                    digest=item.fingerprint[:_DIGEST_CHARACTERS],
                    source_type="local",
                    source=json.dumps({"uri": item.source}),
                    profile=json.dumps(dict(item.profile)),
                ),
                tags=[InputTag("mlflow.data.context", item.context)],
            )
            for item in inputs
        ]
        self._guarded("inputs", lambda: self._client.log_inputs(self.run.run_id, datasets=datasets))
        for item in inputs:
            tag = f"{item.context}_fingerprint"
            self._guarded("inputs", lambda t=tag, f=item.fingerprint: self._client.set_tag(self.run.run_id, t, f))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if step > self._logged_up_to(name):
                self._last_step[name] = step
                self._buffer.append(Metric(name, float(value), now, step))
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        if step <= self._logged_up_to("sample/characters"):
            return
        row = {"step": [step], "prompt": [prompt], "text": [text]}
        self._guarded("sample", lambda: self._client.log_table(self.run.run_id, row, "samples.json"))
        self.log_metrics({"sample/characters": len(text)}, step)

    def log_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        self._guarded("checkpoint", lambda: self._log_model(step, path, metrics))

    def log_file(self, path: Path) -> None:
        self._guarded("file", lambda: self._client.log_artifact(self.run.run_id, str(path)))

    def flush(self) -> None:
        self._last_flush = time.monotonic()
        while self._buffer:
            batch = self._buffer[:_MAX_BATCH]
            if not self._guarded("metrics", lambda b=batch: self._client.log_batch(self.run.run_id, metrics=b)):
                return  # kept, and sent with the next flush
            del self._buffer[: len(batch)]

    def finish(self, status: Literal["FINISHED", "FAILED"]) -> None:
        self.flush()
        self._guarded("curves", self._log_curves)
        self._guarded("status", lambda: self._client.set_terminated(self.run.run_id, status))

    def _logged_up_to(self, name: str) -> int:
        """The last step at which ``name`` was logged, by this process or by the one before a restart."""
        if name not in self._last_step:
            history: list[Any] = []
            self._guarded("history", lambda: history.extend(self._client.get_metric_history(self.run.run_id, name)))
            self._last_step[name] = max((point.step for point in history), default=-1)
        return self._last_step[name]

    def _log_model(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        name = f"step-{step:06d}"
        known = self._client.search_logged_models(
            [self.run.experiment_id], filter_string=f"source_run_id = '{self.run.run_id}' AND name = '{name}'"
        )
        if known:
            return
        model = self._client.create_logged_model(
            self.run.experiment_id,
            name=name,
            source_run_id=self.run.run_id,
            tags={"checkpoint": str(path), "step": str(step)},
            model_type="gpt-2.5-checkpoint",
        )
        self._client.log_outputs(self.run.run_id, models=[LoggedModelOutput(model.model_id, step)])
        for key, value in metrics.items():
            self._client.log_metric(self.run.run_id, f"checkpoint/{key}", value, step=step, model_id=model.model_id)
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def _log_curves(self) -> None:
        """The loss and learning-rate curves as one picture, curves.png."""
        from matplotlib.figure import Figure

        names = ("train/loss", "val/loss", "train/lr")
        history = {name: self._client.get_metric_history(self.run.run_id, name) for name in names}
        if not history["train/loss"]:
            return
        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.add_subplot()
        for name in names[:2]:
            axis.plot([p.step for p in history[name]], [p.value for p in history[name]], label=name)
        axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        rate = axis.twinx()
        rate.plot([p.step for p in history["train/lr"]], [p.value for p in history["train/lr"]], "k:", label="train/lr")
        rate.set_ylabel("learning rate")
        axis.legend(loc="upper right")
        self._client.log_figure(self.run.run_id, figure, "curves.png")

    def _guarded(self, what: str, action: Any) -> bool:
        """Whether ``action`` got through; a failure of the store is a warning, because the run matters more."""
        try:
            action()
        except mlflow_errors() as error:
            logger.warning("MLflow did not take the %s (%s); training goes on", what, _first_line(error))
            return False
        return True


def mlflow_errors() -> tuple[type[Exception], ...]:
    """What a store that is away or broken raises."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)


def _first_line(error: BaseException) -> str:
    return without_password(next(iter(str(error).splitlines()), type(error).__name__))


def mlflow_uri(tracking_uri: str | None, working_folder: Path) -> str:
    """The store that is meant: the given one, MLFLOW_TRACKING_URI, or sqlite in the working folder."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{working_folder / 'mlflow.db'}"


def _client(uri: str) -> Any:
    # A dead server must not stall the ranks for MLflow's default of four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


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


def _note_run_id(folder: Folder, uri: str, run_id: str) -> None:
    folder.make()
    folder.write(_NOTE, [json.dumps({"tracking_uri": without_password(uri), "run_id": run_id}).encode()])


def _noted_run_id(client: Any, folder: Folder, uri: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        noted = json.loads(folder.read(_NOTE))
    except FileNotFoundError:
        return None
    if noted["tracking_uri"] != without_password(uri):
        return None
    try:
        return str(client.get_run(noted["run_id"]).info.run_id)
    except MlflowException:
        logger.warning("MLflow at %s no longer knows run %s; starting a new one", uri, noted["run_id"])
        return None


def read_history(run: MLflowRun, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a run, by step; what a store that does not answer leaves out costs a warning."""
    client = _client(run.tracking_uri)
    found: dict[str, list[tuple[int, float]]] = {}
    for name in names:
        try:
            points = client.get_metric_history(run.run_id, name)
        except mlflow_errors() as error:
            logger.warning("MLflow did not give %s (%s)", name, _first_line(error))
            continue
        found[name] = sorted({point.step: point.value for point in points}.items())
    return found
