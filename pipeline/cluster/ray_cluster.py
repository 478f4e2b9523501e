"""Joining or starting Ray.

A job runs the same in three ways: alone (a local Ray is started), with RAY_ADDRESS set, or under ``ray job submit``.

A cluster file sets these environment variables for the jobs (deploy/, docs/cluster.md): GPT25_HOME (paths.py);
GPT25_NODES, the number of nodes that are always there; GPT25_AUTOSCALING=1 where others are added on demand;
GPT25_MAX_CPUS, the CPUs of the cluster with all of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import exit_signals
from pipeline.cluster.auth_token import ensure_private_token
from pipeline.errors import UserError
from pipeline.paths import submitted

logger = logging.getLogger(__name__)

_NOISE = "Failed to query Ray Train Controller|Reporting training result|PreemptionWatcher"
_PLACES = ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "GPT25_CACHE", "GPT25_COMMIT")
_NODES_SECONDS = 180.0  # how long a job waits for machines of the cluster file that still start, or are gone
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # else every line begins with "(RayTrainWorker pid=...)", in colours
    "RAY_COLOR_PREFIX": "0",  # else what still has a prefix, such as "(raylet)", has colours in files too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ALONE = {
    "RAY_AUTH_MODE": "token",  # a joined cluster has its own mode
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so Ray calls "listen on 127.0.0.1 only", on Linux too
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node but this one
    "RAY_worker_niceness": "0",  # Ray's own 15 lets every other program go ahead of the one that was asked for
}


def connect(*, num_cpus: int) -> None:
    """Join the cluster that the environment names, or start a local Ray with ``num_cpus`` logical CPUs."""
    starts_one = not named_by_environment()
    if starts_one:
        set_local_environment()
    _set_defaults(_QUIET)
    import ray  # reads the variables as it is imported

    if ray.is_initialized():
        return
    with _signals_kept():
        if submitted():
            ray.init()  # address and runtime environment come with the job
        elif not starts_one:
            _require_answer(os.environ["RAY_ADDRESS"])
            ray.init(logging_level=logging.WARNING, runtime_env=_project_on_path())
        else:
            _start(num_cpus)
    if submitted():
        _await_nodes(int(os.environ.get("GPT25_NODES", "1")))


def named_by_environment() -> bool:
    """Whether the environment names a cluster, so that none is started on this machine."""
    return submitted() or bool(os.environ.get("RAY_ADDRESS"))


def _start(num_cpus: int) -> None:
    """Start a local Ray; UserError where its files and sockets cannot be made."""
    import ray

    logger.info("starting Ray on %d CPUs of this machine", num_cpus)
    try:
        with _apart(), _project_inherited():
            ray.init(
                address="local",  # not a cluster that another user started on this machine
                num_cpus=num_cpus,
                include_dashboard=True,  # without it Ray Train warns once a second
                dashboard_host="127.0.0.1",
                logging_level=logging.WARNING,
            )
    except (TimeoutError, ConnectionError) as error:
        raise _not_started(error) from error
    except OSError as error:
        place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        reason = error.strerror or str(error)
        if "AF_UNIX" in str(error):
            reason = f"its sockets in {place} would have paths of more than 107 bytes, the most that Linux allows"
        raise UserError(
            f"Ray cannot start: {reason}; set RAY_TMPDIR to a folder with a short path that can be written, for "
            "instance RAY_TMPDIR=/tmp"
        ) from error
    except Exception as error:
        # Ray raises these two for a process that ends or does not answer in time, not a subclass of its own
        if type(error) not in (Exception, RuntimeError) and not isinstance(error, ray.exceptions.RayError):
            raise
        raise _not_started(error) from error


def _not_started(error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0].rstrip(".")
    if "dashboard.err" in reason:
        reason = "its dashboard did not come up in time"
    return UserError(
        f"Ray did not start on this machine ({reason}); give the same command again, where the machine has less to do "
        "or more free memory"
    )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """A context after which this process handles its signals again as before: ray.init takes SIGTERM."""
    try:
        yield
    except SystemExit as stop:  # by Ray's handler, whose exit code is the signal's number
        if stop.code == signal.SIGTERM:
            exit_signals.interrupt(signal.SIGTERM)
        raise
    finally:
        exit_signals.take_handlers()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """A context in which Ray's processes are started in process groups of their own.

    A signal for the group of this job (of `timeout`, of a batch system) would end the cluster under its workers, which
    have a checkpoint to save. This process ends them, and they end with it.
    """
    from ray._private import services

    original = services.ConsolePopen
    services.ConsolePopen = functools.partial(original, process_group=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = original  # type: ignore[misc]


def set_local_environment() -> None:
    """Set the variables of a local Ray, before ray is imported: it asks for a token and listens on 127.0.0.1 only."""
    _set_defaults({**_QUIET, **_ALONE})
    ensure_private_token()


def _set_defaults(variables: dict[str, str]) -> None:
    os.environ.update({name: value for name, value in variables.items() if name not in os.environ})


def _await_nodes(expected: int) -> None:
    """Wait for machines that are still starting: ``ray up`` returns as soon as the head node runs."""
    import ray

    deadline = time.monotonic() + _NODES_SECONDS
    announced = False
    while (alive := sum(bool(node["Alive"]) for node in ray.nodes())) < expected:
        if time.monotonic() > deadline:
            logger.warning("%d of the cluster's %d machines are there; going on with them", alive, expected)
            return
        if not announced:
            logger.info("%d of the cluster's %d machines are there; waiting for the others", alive, expected)
            announced = True
        time.sleep(1)


def _require_answer(address: str) -> None:
    """Raise a UserError if no cluster answers; Ray itself would try for five minutes."""
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
    """Check that the cluster can hold the workers; Ray itself would wait for ever.

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


def require_device(device: str) -> None:
    """UserError where --device cuda would start a local Ray on a machine without a GPU; a cluster knows by itself."""
    if device != "cuda" or named_by_environment():
        return
    import ray
    import torch

    if not ray.is_initialized() and not torch.cuda.is_available():
        raise UserError(
            "--device cuda was asked for, but torch sees no GPU on this machine; use --device cpu or auto, or name a "
            "cluster with RAY_ADDRESS"
        )


def autoscales() -> bool:
    """Whether nodes are added on demand, as cluster.yaml says by GPT25_AUTOSCALING=1."""
    return os.environ.get("GPT25_AUTOSCALING") == "1"


def cpus() -> int:
    """Number of CPUs that work may be divided for: those of the cluster, or those that it can grow to."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)), int(os.environ.get("GPT25_MAX_CPUS", "1")))


@contextlib.contextmanager
def _project_inherited() -> Iterator[None]:
    """A context in which processes that are started find this checkout first.

    For a local Ray, whose workers inherit the variables of this process: with a runtime environment, Ray could not use
    the workers that it starts ahead.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(_python_path())
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _python_path() -> list[str]:
    """This checkout, and what PYTHONPATH names for this process."""
    given = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [str(Path(__file__).resolve().parents[2]), *given]


def _project_on_path() -> dict[str, Any]:
    """A runtime environment in which workers import this checkout and use the addresses and caches of the driver.

    This checkout comes before what PYTHONPATH names for the driver and, on the cluster that is joined, for the node.

    Secrets are not passed on this way, because Ray shows it to everyone: the nodes of a cluster have their own.
    """
    places = {name: os.environ[name] for name in _PLACES if name in os.environ}
    path = [*_python_path(), "${PYTHONPATH}"]  # the last is the node's, which Ray fills in
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path), **places}}
