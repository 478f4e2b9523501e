"""Writes a journal entry of each kind to an MLflow run. Writing it again, whole or in part, adds nothing."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run_files import CHECKPOINTS_FOLDER, CURVES_FILE, run_folder_of
from pipeline.storage.folders import Folder, LocalFolder
from pipeline.tracking.journal import Entry
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_errors

_MAX_BATCH = 1000  # MLflow's limit of metrics per request
_MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
_MAX_TAG_CHARACTERS = 5000  # MLflow's limit
_DIGEST_CHARACTERS = 36  # MLflow's limit of a data set digest
_SAMPLES_FILE = "samples.json"
_TABLES_TAG = "mlflow.loggedArtifacts"  # what the UI shows as tables
_COMMIT_TAG = "mlflow.source.git.commit"  # what the UI shows beside the source
_VERSIONS_TAG = "mlflow.modelVersions"  # a link of a model in the UI; a server sets it, a sqlite store does not
_NOTE_TAG = "mlflow.note.content"  # the description on a run's page
_BEST = "best"
ABANDONED_TAG = "abandoned"
"""Tag of a model whose checkpoint belonged to steps that its run has done again otherwise."""
_DESCRIPTION = "Checkpoints of training runs, each the best of its run by val loss when it was saved: see its tags"
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "NOT_IMPLEMENTED",
    "FEATURE_DISABLED",
}


def is_refused(error: Exception) -> bool:
    """Whether trying again cannot help: the store answered with a refusal, or a file to send no longer exists."""
    return getattr(error, "error_code", None) in _REFUSALS or isinstance(error, FileNotFoundError)


class MLflowWriter:
    """Writes entries to one MLflow run; errors of MLflow's client are raised as they are."""

    def __init__(self, run: MLflowRun, client: Any, folder: Folder | None, registered_model: str | None) -> None:
        self.run, self.client, self.folder, self.registered_model = run, client, folder, registered_model
        self._known_steps: dict[str, set[int]] = {}  # metric -> steps that the store had before this process
        self._models: dict[int, str] = {}  # checkpoint's step -> model id
        self._samples: dict[int, tuple[str, str]] = {}

    def write(self, entries: Sequence[Entry]) -> None:
        """Write entries of one kind; several at once are possible for metrics only."""
        kind = entries[0]["kind"]
        if kind == "metrics":
            self._write_metrics(entries)
            return
        action = {
            "start": self._write_start,
            "params": self._write_params,
            "tags": self._write_tags,
            "inputs": self._write_inputs,
            "sample": self._write_sample,
            "checkpoint": self._write_checkpoint,
            "file": self._write_file,
            "page": self._write_page,
            "rollback": lambda entry: None,  # one that this run of MLflow comes after
            "status": self._write_status,
        }[kind]
        for entry in entries:
            action(entry)

    def give_up_after(self, step: int, successor: str, status: str, end_time: int | None) -> None:
        """Mark the run, whose later steps are done again as the MLflow run ``successor``, and what it registered."""
        from mlflow.exceptions import MlflowException

        self._set_tags({"abandoned_after_step": step, "continued_as": successor})
        self.client.set_terminated(self.run.run_id, status, end_time=end_time)
        why = f"its run went back to step {step}"
        for output in getattr(self.client.get_run(self.run.run_id).outputs, "model_outputs", []):
            if output.step > step:
                self.client.set_logged_model_tags(output.model_id, {ABANDONED_TAG: why})
        for version in self.client.search_model_versions(f"run_id = '{self.run.run_id}'"):
            told = version.tags.get("step", "")
            if told.isdecimal() and int(told) > step:
                self.client.set_model_version_tag(version.name, version.version, ABANDONED_TAG, why)
            try:  # the successor's own best takes it
                holder = self.client.get_model_version_by_alias(version.name, _BEST)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
            else:
                if holder.run_id == self.run.run_id:
                    self.client.delete_registered_model_alias(version.name, _BEST)

    def deleted_experiment(self) -> str | None:
        """Id of the run's experiment, if that is deleted."""
        try:
            experiment = self.client.get_experiment(self.run.experiment_id)
        except mlflow_errors():
            return None
        return self.run.experiment_id if experiment.lifecycle_stage == "deleted" else None

    def _write_start(self, entry: Entry) -> None:
        """A process of the run begins: an end that was told before was not the last one."""
        if self.folder is not None:  # else it is a job about the run
            self.client.update_run(self.run.run_id, status="RUNNING")

    def _write_params(self, entry: Entry) -> None:
        """Log parameters. MLflow's cannot change, so a setting that a resumed run changes becomes a tag."""
        from mlflow.entities import Param

        values = {name: str(value)[:_MAX_PARAM_CHARACTERS] for name, value in entry["values"].items()}
        data = self.client.get_run(self.run.run_id).data
        logged = data.params
        new = [Param(name, value) for name, value in values.items() if name not in logged]
        for start in range(0, len(new), 100):  # MLflow's limit of params per request
            self.client.log_batch(self.run.run_id, params=new[start : start + 100])
        in_force = {name: data.tags.get(f"resumed.{name}", value) for name, value in logged.items()}
        changed = {name: value for name, value in values.items() if in_force.get(name, value) != value}
        self._set_tags({f"resumed.{name}": value for name, value in changed.items()})

    def _write_tags(self, entry: Entry) -> None:
        commit = entry["values"].get("commit", "unknown").removesuffix("+changes")
        known = {} if commit == "unknown" else {_COMMIT_TAG: commit}
        self._set_tags(entry["values"] | known)

    def _write_inputs(self, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [
            DatasetInput(
                dataset=Dataset(
                    name=item["name"],
                    digest=item["fingerprint"][:_DIGEST_CHARACTERS],
                    source_type="local",
                    source=json.dumps({"uri": item["source"]}),
                    profile=json.dumps(item["profile"]),
                ),
                tags=[InputTag(name, str(value)) for name, value in _input_tags(item).items()],
            )
            for item in entry["values"]
        ]
        self.client.log_inputs(self.run.run_id, datasets=datasets)
        self._set_tags(_fingerprints(entry["values"]))

    def _write_metrics(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, entry["time"], entry["step"])
            for entry in entries
            for name, value in entry["values"].items()
            if entry["step"] not in self._steps(name)
        ]
        for start in range(0, len(points), _MAX_BATCH):
            self.client.log_batch(self.run.run_id, metrics=points[start : start + _MAX_BATCH])

    def _steps(self, name: str) -> set[int]:
        if name not in self._known_steps:
            history = self.client.get_metric_history(self.run.run_id, name)
            self._known_steps[name] = {point.step for point in history}
        return self._known_steps[name]

    def _write_sample(self, entry: Entry) -> None:
        """Write the whole table of samples again, because MLflow cannot add a row to one."""
        if not self._samples:
            self._samples = self._stored_samples()
        self._samples[entry["step"]] = (entry["prompt"], entry["text"])
        rows = [[step, prompt, text] for step, (prompt, text) in sorted(self._samples.items())]
        table = {"columns": ["step", "prompt", "text"], "data": rows}
        self.client.log_dict(self.run.run_id, table, _SAMPLES_FILE)
        self._set_tags({_TABLES_TAG: json.dumps([{"path": _SAMPLES_FILE, "type": "table"}])})

    def _stored_samples(self) -> dict[int, tuple[str, str]]:
        """The rows that an earlier process wrote."""
        if _TABLES_TAG not in self.client.get_run(self.run.run_id).data.tags:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = self.client.download_artifacts(self.run.run_id, _SAMPLES_FILE, folder)
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        return {int(step): (prompt, text) for step, prompt, text in rows}

    def _write_checkpoint(self, entry: Entry) -> None:
        """Log a checkpoint as an MLflow model with the checkpoint's address; no file is copied."""
        from mlflow.entities import LoggedModelStatus

        step, path = entry["step"], self._address(entry)
        model_id = self._model(step, path)
        for key, value in entry["values"].items():
            name = f"checkpoint/{key}"
            self.client.log_metric(self.run.run_id, name, value, timestamp=entry["time"], step=step, model_id=model_id)
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        if entry["best"]:
            self._set_tags({"best_step": str(step), "best_val_loss": str(entry["values"].get("val_loss"))})
            if self.registered_model:
                self._register(self.registered_model, entry, model_id)

    def _address(self, entry: Entry) -> str:
        """The checkpoint's address; in a folder that was copied or moved it is no longer that of the entry."""
        path = str(entry["path"])
        if self.folder is None or run_folder_of(path) is None:
            return path
        return f"{self.folder}/{CHECKPOINTS_FOLDER}/{path.rstrip('/').rpartition('/')[2]}"

    def _model(self, step: int, path: str) -> str:
        """Id of the MLflow model of a checkpoint, which is created unless it exists."""
        if step in self._models:
            return self._models[step]
        from mlflow.entities import LoggedModelOutput

        name, run_id = f"step-{step:06d}", self.run.run_id
        known = self.client.search_logged_models(
            [self.run.experiment_id], filter_string=f"source_run_id = '{run_id}' AND name = '{name}'"
        )
        model = (
            known[0]
            if known
            else self.client.create_logged_model(
                self.run.experiment_id,
                name=name,
                source_run_id=run_id,
                tags={"checkpoint": path, "step": str(step)},
                model_type="gpt-2.5-checkpoint",
            )
        )
        outputs = self.client.get_run(run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self.client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step)])
        self._models[step] = str(model.model_id)
        return self._models[step]

    def _register(self, name: str, entry: Entry, model_id: str) -> None:
        """Register the run's best in place of its best before, and give it the alias unless another run has a better
        one on the same data.
        """
        data = self.client.get_run(self.run.run_id).data.tags.get("validation_fingerprint", "")
        holder = self._registered(name).aliases.get(_BEST)
        version = self._version(name, entry, model_id, data)
        if holder is None or self._is_better(name, str(holder), data, entry["values"]["val_loss"]):
            self.client.set_registered_model_alias(name, _BEST, version)
        self._delete_versions(name, other_than=version)

    def _delete_versions(self, name: str, *, other_than: str) -> None:
        """Delete the run's other versions of a model, but those that somebody has given an alias."""
        from mlflow.exceptions import MlflowException

        for found in self.client.search_model_versions(f"run_id = '{self.run.run_id}'"):
            if found.name != name or str(found.version) == other_than:
                continue
            version = self.client.get_model_version(name, found.version)
            if version.aliases:
                continue
            try:
                self.client.delete_model_version(name, version.version)
            except MlflowException as error:
                if error.error_code != "PERMISSION_DENIED":
                    raise
                return
            if version.model_id:
                model = self.client.get_logged_model(version.model_id)
                links = json.loads(model.tags.get(_VERSIONS_TAG, "[]"))
                left = [link for link in links if (link["name"], str(link["version"])) != (name, str(version.version))]
                self.client.set_logged_model_tags(version.model_id, {_VERSIONS_TAG: json.dumps(left)})

    def _version(self, name: str, entry: Entry, model_id: str, data: str) -> str:
        """Number of a checkpoint's version, which is created unless it exists and linked from its model's page."""
        step = str(entry["step"])
        versions = self.client.search_model_versions(f"run_id = '{self.run.run_id}'")
        mine = [version for version in versions if version.name == name and version.tags.get("step") == step]
        model = self.client.get_logged_model(model_id)
        tags = {
            "checkpoint": self._address(entry),
            "step": step,
            "val_loss": repr(entry["values"]["val_loss"]),
            "validation_fingerprint": data,
        }
        version = mine[0] if mine else self.client.create_model_version(
            name, model.artifact_location, run_id=self.run.run_id, tags=tags, model_id=model_id
        )  # fmt: skip
        link = {"name": name, "version": version.version}
        links = json.loads(model.tags.get(_VERSIONS_TAG, "[]"))
        if link not in links:
            self.client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps([*links, link])})
        return str(version.version)

    def _is_better(self, name: str, holder: str, data: str, val_loss: float) -> bool:
        """Whether the version ``holder`` is of this run, of other data, or has a higher val loss."""
        rival = self.client.get_model_version(name, holder)
        same_data = rival.tags.get("validation_fingerprint") == data
        return rival.run_id == self.run.run_id or not same_data or val_loss < float(rival.tags["val_loss"])

    def _registered(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return self.client.create_registered_model(name, description=_DESCRIPTION)

    def _write_file(self, entry: Entry) -> None:
        path = Path(entry["path"])
        if self.folder is not None:  # without one the journal is this process's own
            _require_inside(self.folder, path)
        self.client.log_artifact(self.run.run_id, str(path))
        if path.name == CURVES_FILE:
            self._write_note()

    def _write_page(self, entry: Entry) -> None:
        assert self.folder is not None
        if isinstance(self.folder, LocalFolder):
            _require_inside(self.folder, self.folder.path / entry["name"])
        with tempfile.TemporaryDirectory() as temporary:
            folder, _, name = entry["name"].rpartition("/")
            path = Path(temporary) / name
            path.write_bytes(self.folder.read(entry["name"]))
            self.client.log_artifact(self.run.run_id, str(path), folder or None)
        if entry["name"] == CURVES_FILE:
            self._write_note()

    def _write_note(self) -> None:
        """Describe the run by its figures and the picture of its curves, unless somebody has described it."""
        data = self.client.get_run(self.run.run_id).data
        picture = f"(get-artifact?path={CURVES_FILE}&run_uuid={self.run.run_id})"
        if (note := data.tags.get(_NOTE_TAG)) and picture not in note:
            return
        figures = {
            "train loss": data.metrics.get("train/loss"),
            "val loss": data.metrics.get("val/loss"),
            "whole val set": data.tags.get("eval/val_loss"),
        }
        shown = ", ".join(f"{name} **{float(value):.4f}**" for name, value in figures.items() if value is not None)
        chart = f"[in one chart with other runs]({self.run.view}&compareRunsMode=CHART)"
        self._set_tags({_NOTE_TAG: f"{shown} ({chart})\n\n![train and val loss, learning rate, speed]{picture}"})

    def _write_status(self, entry: Entry) -> None:
        self.client.set_terminated(self.run.run_id, entry["status"], end_time=entry["time"])

    def _set_tags(self, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, str(value)[:_MAX_TAG_CHARACTERS]) for name, value in values.items()]
        for start in range(0, len(tags), 100):  # MLflow's limit of tags per request
            self.client.log_batch(self.run.run_id, tags=tags[start : start + 100])


def _input_tags(item: Mapping[str, Any]) -> dict[str, Any]:
    weight = {"weight": item["weight"]} if "weight" in item else {}
    return {"mlflow.data.context": item["context"], **weight}


def _fingerprints(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A fingerprint of each use of inputs: that of the one input, or of all that are mixed, with their weights."""
    by_context: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        by_context.setdefault(item["context"], []).append(item)
    found = {}
    for context, members in by_context.items():
        mixed = json.dumps([[item["fingerprint"], item.get("weight")] for item in members])
        whole = members[0]["fingerprint"] if len(members) == 1 else hashlib.sha256(mixed.encode()).hexdigest()
        found[f"{context}_fingerprint"] = whole
    return found


def _require_inside(folder: Folder, path: Path) -> None:
    """UserError unless ``path``, links followed, lies in the run's folder: a foreign journal could name any file."""
    inside = isinstance(folder, LocalFolder) and path.resolve().is_relative_to(folder.path.resolve())
    if not inside:
        raise UserError(f"the journal of {folder} names the file {path}, which is none of its folder")
