"""Joining or starting Ray, and where relative paths lie.

A job runs in three ways, and says nothing about which: alone (a local Ray is started), with RAY_ADDRESS set, and
under ``ray job submit``. Under the last the current folder is a throw-away copy of the project, so relative paths
count from GPT25_HOME, or ~/gpt-2.5 where that is not set.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources import INSTALLED_DOCS
from pipeline.storage import Folder, is_url, open_folder

logger = logging.getLogger(__name__)

_NOISE = "Failed to query Ray Train Controller|Reporting training result|PreemptionWatcher"
_PLACES = ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "GPT25_CACHE")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def submitted() -> bool:
    """Whether this process is the driver of a ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def working_folder() -> Path:
    """What relative paths count from."""
    home = os.environ.get("GPT25_HOME")
    if home:
        return Path(home).expanduser().absolute()
    return Path.home() / "gpt-2.5" if submitted() else Path.cwd()


def resolve_path(path: str) -> Path:
    """An absolute path, the same in the driver and in every worker."""
    expanded = Path(path).expanduser()
    if re.match(r"^[a-z][a-z0-9]*://", path):
        raise UserError(
            f"{path}: only folders that every node sees are supported here; mount the bucket, or give a path"
        )
    return expanded if expanded.is_absolute() else working_folder() / expanded


def resolve_output(path: str) -> Folder:
    """Where a job writes to: a bucket's address, or an absolute path, the same in the driver and in every worker."""
    return open_folder(path if is_url(path) else resolve_path(path))


def resolve_source(source: str) -> str:
    """A source as every worker finds it: local paths made absolute; addresses and installed-docs stay."""
    return source if is_url(source) or source == INSTALLED_DOCS else str(resolve_path(source))


def make_output(folder: Path) -> None:
    """Make the folder that a job writes to, before anything else is made for it; UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"output folder {folder} cannot be made: {reason}; choose another --output") from error


def connect(*, num_cpus: int) -> None:
    """Join the cluster that the environment names, or start a local Ray with ``num_cpus`` logical CPUs."""
    starts_one = not (submitted() or os.environ.get("RAY_ADDRESS"))
    defaults = {**_QUIET, "RAY_AUTH_MODE": "token"} if starts_one else _QUIET  # a joined cluster has its own mode
    os.environ.update({name: value for name, value in defaults.items() if name not in os.environ})
    import ray  # reads the variables as it is imported

    if ray.is_initialized():
        return
    if submitted():
        ray.init()  # address and runtime environment come with the job
    elif not starts_one:
        _require_answer(os.environ["RAY_ADDRESS"])
        ray.init(logging_level=logging.WARNING, runtime_env=_project_on_path())
    else:
        ray.init(
            address="local",  # not the cluster that somebody else started on this machine
            num_cpus=num_cpus,
            include_dashboard=True,  # without it Ray Train warns once a second
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            runtime_env=_project_on_path(),
        )


def _require_answer(address: str) -> None:
    """Ray itself tries for five minutes before it says that nobody is there."""
    match = re.fullmatch(r"([\w.-]+):(\d+)", address)
    if match is None:  # "auto", or a scheme that Ray knows
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"no Ray cluster at RAY_ADDRESS {address} ({reason}); start it, or unset RAY_ADDRESS"
        ) from error


def shut_down() -> None:
    """Leave the cluster; a local Ray ends with it."""
    import ray

    ray.shutdown()


def require(*, num_workers: int, gpus: bool) -> None:
    """Say at once when the cluster cannot hold the workers; Ray itself would wait for ever.

    Raises:
        UserError: fewer CPUs (or GPUs) in the cluster than workers, and nothing that would add nodes.
    """
    import ray

    kind = "GPU" if gpus else "CPU"
    available = int(ray.cluster_resources().get(kind, 0))
    if available >= num_workers:
        return
    if autoscales():
        logger.info("the cluster has %d %ss for %d workers; waiting for the autoscaler", available, kind, num_workers)
        return
    raise UserError(
        f"{num_workers} workers need {num_workers} {kind}s, but the cluster has {available}; "
        f"lower --num_workers or add nodes"
    )


def autoscales() -> bool:
    """Whether nodes are added on demand, as cluster.yaml says by GPT25_AUTOSCALING=1."""
    return os.environ.get("GPT25_AUTOSCALING") == "1"


def _project_on_path() -> dict[str, Any]:
    """Workers import model and pipeline from this checkout, wherever the driver was started, and look where it looks.

    Secrets do not travel so, because Ray shows this to everyone: a local Ray inherits them, a cluster's nodes have
    their own.
    """
    root = str(Path(__file__).resolve().parent.parent)
    places = {name: os.environ[name] for name in _PLACES if name in os.environ}
    return {"env_vars": {"PYTHONPATH": root, **places}}
