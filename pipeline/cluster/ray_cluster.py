"""Joining or starting Ray, and where relative paths lie.

A job runs in three ways, and says nothing about which: alone (a local Ray is started), with RAY_ADDRESS set, and
under ``ray job submit``. Under the last the current folder is a throw-away copy of the project, so relative paths
count from GPT25_HOME, a folder or a bucket, or from ~/gpt-2.5 where that is not set.

What a cluster file tells the jobs by environment (deploy/, docs/cluster.md): GPT25_HOME; GPT25_NODES, nodes that are
always there; GPT25_AUTOSCALING=1, others come when they are asked for; GPT25_MAX_CPUS, how many CPUs they bring.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources.sources import INSTALLED_DOCS
from pipeline.storage.folders import Folder, is_url, open_folder

logger = logging.getLogger(__name__)

_NOISE = "Failed to query Ray Train Controller|Reporting training result|PreemptionWatcher"
_PLACES = ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "GPT25_CACHE", "GPT25_COMMIT")
_NODES_SECONDS = 180.0  # how long a job waits for machines of the cluster file that still start, or are gone
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ALONE = {
    "RAY_AUTH_MODE": "token",  # a joined cluster has its own mode
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node but this one
}


def submitted() -> bool:
    """Whether this process is the driver of a ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def working_folder() -> Path:
    """The local folder that relative paths count from, unless GPT25_HOME is a bucket."""
    home = os.environ.get("GPT25_HOME", "")
    if home and not is_url(home):
        return Path(home).expanduser().absolute()
    return Path.home() / "gpt-2.5" if home or submitted() else Path.cwd()


def resolve_path(path: str) -> Path:
    """An absolute path, the same in the driver and in every worker."""
    url = _in_bucket(path)
    if url is not None:
        raise UserError(f"{url}: only folders that every node sees are supported here; give an absolute path")
    return working_folder() / Path(path).expanduser()


def resolve_output(path: str) -> Folder:
    """Where a job writes to: a bucket's address, or an absolute path, the same in the driver and in every worker."""
    return open_folder(_in_bucket(path) or resolve_path(path))


def resolve_source(source: str) -> str:
    """A source as every worker finds it: relative paths made absolute; addresses and installed-docs stay."""
    return source if source == INSTALLED_DOCS else _in_bucket(source) or str(resolve_path(source))


def _in_bucket(path: str) -> str | None:
    """The URL of ``path``, where it is one or counts from a GPT25_HOME that is one."""
    if is_url(path):
        return path
    home = os.environ.get("GPT25_HOME", "")
    if not is_url(home) or Path(path).expanduser().is_absolute():
        return None
    return f"{home.rstrip('/')}/{path}"


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
    defaults = {**_QUIET, **_ALONE} if starts_one else _QUIET
    os.environ.update({name: value for name, value in defaults.items() if name not in os.environ})
    import ray  # reads the variables as it is imported

    if ray.is_initialized():
        return
    if submitted():
        ray.init()  # address and runtime environment come with the job
        _await_nodes(int(os.environ.get("GPT25_NODES", "1")))
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


def _await_nodes(expected: int) -> None:
    """Give machines that still start the time for it: ``ray up`` returns when the head is there."""
    import ray

    deadline = time.monotonic() + _NODES_SECONDS
    told = False
    while (alive := sum(bool(node["Alive"]) for node in ray.nodes())) < expected:
        if time.monotonic() > deadline:
            logger.warning("%d of the cluster's %d machines are there; going on with them", alive, expected)
            return
        if not told:
            logger.info("%d of the cluster's %d machines are there; waiting for the others", alive, expected)
            told = True
        time.sleep(1)


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


def cpus() -> int:
    """CPUs that work may be cut up for: those of the cluster, or those it can grow to."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)), int(os.environ.get("GPT25_MAX_CPUS", "1")))


def _project_on_path() -> dict[str, Any]:
    """Workers import model and pipeline from this checkout, wherever the driver was started, and look where it looks.

    Secrets do not travel so, because Ray shows this to everyone: a local Ray inherits them, a cluster's nodes have
    their own.
    """
    root = str(Path(__file__).resolve().parents[2])
    places = {name: os.environ[name] for name in _PLACES if name in os.environ}
    return {"env_vars": {"PYTHONPATH": root, **places}}
