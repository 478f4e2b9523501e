"""What a group of workers waits for: places in the cluster, and what the autoscaler last failed with."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray

from pipeline.console import format_seconds

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

SECONDS = 60.0
"""Between two lines."""

logger = logging.getLogger(__name__)


class WaitingReporter:
    """Logs a line for every minute that is spent waiting.

    Args:
        describe: what is waited for, a part of a sentence.
        seconds: between two lines.
    """

    def __init__(self, describe: Callable[[], str], *, seconds: float = SECONDS) -> None:
        self._describe, self._seconds = describe, seconds
        self._ended: threading.Event | None = None

    def begin(self) -> None:
        """From now on there is waiting, if there was none before."""
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._report, args=(self._ended,), name="waiting", daemon=True).start()

    def end(self) -> None:
        """Nothing is waited for any longer."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    def _report(self, ended: threading.Event) -> None:
        began = time.monotonic()
        while not ended.wait(self._seconds):
            try:
                what = self._describe()
            except Exception as error:  # noqa: BLE001  # Ray's errors have no common class, and this is for people only
                what = f"a group of workers; the cluster does not say why ({error})"
            if not ended.is_set():
                logger.warning("has waited %s for %s", format_seconds(time.monotonic() - began), what)


def describe_places(num_workers: int, resources: dict[str, float]) -> str:
    """What keeps ``num_workers`` workers, each with ``resources`` such as {"GPU": 1}, from starting."""
    wanted = f"{num_workers} workers with {_listed(resources)} each"
    total, free = ray.cluster_resources(), ray.available_resources()
    counts = [
        f"{total.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind, amount in resources.items() if amount
    ]
    groups = ray.util.placement_group_table().values()
    if all(total.get(kind, 0) >= num_workers * amount for kind, amount in resources.items()) and not any(
        group["state"] in ("PENDING", "RESCHEDULING") for group in groups
    ):
        return f"{wanted}: they have their places, and their processes are starting"
    return f"{wanted}: the cluster has {' and '.join(counts)}{_autoscaler_says()}"


def _autoscaler_says() -> str:
    """What the autoscaler does and last failed with, to stand behind a sentence; empty without an autoscaler."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    return describe_autoscaler(get_cluster_status(ray.get_runtime_context().gcs_address))


def describe_autoscaler(status: ClusterStatus) -> str:
    """The launches that are under way and the newest one that failed; empty where there are none."""
    parts = []
    starting = [launch.ray_node_type_name for launch in status.pending_launches for _ in range(launch.count)]
    starting += [node.ray_node_type_name for node in status.pending_nodes]
    if starting:
        parts.append(f"; the autoscaler starts {_counted(starting)}")
    if status.failed_launches:
        last = max(status.failed_launches, key=lambda launch: launch.failed_ts_s or launch.request_ts_s)
        when = datetime.datetime.fromtimestamp(last.failed_ts_s or last.request_ts_s).astimezone()
        reason = " ".join((last.details or "it gave no reason").split())
        parts.append(f"; the autoscaler last failed at {when:%H:%M:%S} to start {last.ray_node_type_name}: {reason}")
    return "".join(parts)


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "no resources"


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
