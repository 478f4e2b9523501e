"""Models in MLflow: models:/... and runs:/... become the address of a checkpoint or the path of a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tracking.mlflow_run import mlflow_errors, mlflow_uri
from pipeline.tracking.mlflow_writer import ABANDONED_TAG

SCHEMES = ("models:/", "runs:/")
"""How the address of a model in MLflow begins."""


def find_model(address: str, working_folder: Path) -> str:
    """What stands behind models:/... or runs:/...: a checkpoint's address, or the path of a downloaded exported folder.

    Training logs checkpoints by their address alone; jobs/export.py --mlflow logs the exported folder itself.

    Raises:
        UserError: MLflow does not know the model, or it is no model of this project.
    """
    import mlflow

    try:
        with tracking_store(mlflow_uri(None, working_folder)):
            if checkpoint := _named_checkpoint(address):
                return checkpoint
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=address))
    except mlflow_errors() as error:
        raise UserError(f"MLflow has no model {address}: {' '.join(str(error).split())}") from error
    folders = sorted(file.parent for file in local.glob("artifacts/*/config.json"))
    if not folders:
        raise UserError(f"{address} holds no exported model of this project; log one with jobs/export.py --mlflow")
    return str(folders[0])


@contextlib.contextmanager
def tracking_store(uri: str) -> Iterator[None]:
    """Let MLflow's module-level functions use the store ``uri``; afterwards settings and environment are as before."""
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if variable is not None:
            os.environ["MLFLOW_TRACKING_URI"] = variable


def _named_checkpoint(address: str) -> str | None:
    """The checkpoint's address behind models:/m-..., models:/NAME@best or models:/NAME/3; None for other models."""
    from mlflow import MlflowClient

    name = address.removeprefix("models:/")
    if name == address:
        return None
    model, _, alias = name.partition("@")
    family, _, version = name.partition("/")
    if alias:
        tags = MlflowClient().get_model_version_by_alias(model, alias).tags
    elif version.isdigit():
        tags = MlflowClient().get_model_version(family, version).tags
    elif name.startswith("m-") and not version:
        tags = MlflowClient().get_logged_model(name).tags
    else:
        return None
    if why := tags.get(ABANDONED_TAG):
        raise UserError(f"{address} is a checkpoint that is gone: {why}; choose another version, or {model}@best")
    checkpoint: str | None = tags.get("checkpoint")
    return checkpoint
