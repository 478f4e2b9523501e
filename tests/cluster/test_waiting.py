"""Who waits is told for what: places that others hold, machines that the autoscaler could not get."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from pathlib import Path

import pytest
import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cluster import waiting
from pipeline.cluster.waiting import WaitingReporter, describe_autoscaler, describe_places
from pipeline.cluster.worker_group import hide_cleaner
from pipeline.cluster.workers import GroupSettings, SharedFiles, run_workers
from pipeline.storage.folders import open_folder

HANG_SECONDS = 1200
FAILED, PENDING = LaunchRequest.Status.FAILED, LaunchRequest.Status.PENDING


def launch(
    kind: str, state: LaunchRequest.Status, at: int, count: int = 1, details: str | None = None
) -> LaunchRequest:
    return LaunchRequest(
        instance_type_name="",
        ray_node_type_name=kind,
        count=count,
        state=state,
        request_ts_s=at,
        failed_ts_s=at + 5 if state is FAILED else None,
        details=details,
    )


def test_what_the_autoscaler_starts_and_last_failed_with() -> None:
    assert describe_autoscaler(ClusterStatus()) == ""
    status = ClusterStatus(
        pending_launches=[launch("gpu", PENDING, 50, count=2), launch("cpu", PENDING, 60)],
        pending_nodes=[NodeInfo(instance_type_name="", ray_node_type_name="gpu", instance_id="", ip_address="")],
        failed_launches=[
            launch("gpu", FAILED, 1_700_000_000, details="ZONE_RESOURCE_POOL_EXHAUSTED:\n  no H100 is left"),
            launch("cpu", FAILED, 1_600_000_000, details="older"),
        ],
    )
    when = datetime.datetime.fromtimestamp(1_700_000_005).astimezone()
    assert describe_autoscaler(status) == (
        "; the autoscaler starts 1 cpu, 3 gpu"
        f"; the autoscaler last failed at {when:%H:%M:%S} to start gpu: ZONE_RESOURCE_POOL_EXHAUSTED: no H100 is left"
    )


def test_a_line_comes_again_and_again_until_the_waiting_ends(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Semaphore(0)

    def describe() -> str:
        asked.release()
        if len(caplog.records) == 1:
            raise RuntimeError("no answer")
        return "a bus"

    reporter = WaitingReporter(describe, seconds=0.01)
    before = threading.active_count()
    reporter.begin()
    reporter.begin()
    assert threading.active_count() == before + 1
    assert all(asked.acquire(timeout=HANG_SECONDS) for _ in range(4))
    reporter.end()
    reporter.end()
    while threading.active_count() > before:
        time.sleep(0.01)
    said = [record.getMessage() for record in caplog.records if record.name == waiting.__name__]
    assert said[0] == "has waited 0:00 for a bus" and "does not say why (no answer)" in said[1] and len(said) >= 3


@pytest.mark.usefixtures("local_ray")
def test_the_places_that_are_missing() -> None:
    gpus = "4 workers with 1 GPU each: the cluster has 0 GPU (0 free)"
    assert describe_places(4, {"GPU": 1}) == gpus
    assert describe_places(2, {"CPU": 1}) == (
        "2 workers with 1 CPU each: they have their places, and their processes are starting"
    )
    taken = placement_group([{"CPU": 1}])
    wanted = placement_group([{"CPU": 1}, {"CPU": 1}])
    try:
        ray.get(taken.ready())
        while "(1 free)" not in (told := describe_places(2, {"CPU": 1})):  # the figures come a moment later
            time.sleep(0.1)
        assert told == "2 workers with 1 CPU each: the cluster has 2 CPU (1 free)"
    finally:
        remove_placement_group(wanted)
        remove_placement_group(taken)


def test_ray_s_own_helper_says_nothing_on_the_terminal() -> None:
    shown: list[str] = []
    dispatcher.add_handler("ray_print_logs", lambda lines: shown.append(lines["actor_name"]))
    try:
        hide_cleaner()
        for name in ("RayTrainWorker", "PlacementGroupCleaner", "TrainController"):
            dispatcher.emit({"actor_name": name, "lines": ["a line"]})
    finally:
        dispatcher.remove_handler("ray_print_logs")
    assert shown == ["RayTrainWorker", "TrainController"]


def done(settings: None, files: SharedFiles) -> str:
    return "done"


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_group_that_waits_says_so_in_the_run_folder(tmp_path: Path) -> None:
    logging.getLogger("pipeline").setLevel(logging.INFO)
    taken = placement_group([{"CPU": 1}])
    ray.get(taken.ready())
    group = GroupSettings(num_workers=2, device="cpu", logs=str(tmp_path / "logs"))
    results: list[str] = []
    run = threading.Thread(target=lambda: results.append(run_workers(done, None, group, open_folder(tmp_path))))
    run.start()
    log = tmp_path / "logs" / "controller.log"
    while not log.exists() or "has waited 1:0" not in log.read_text():
        assert run.is_alive()
        time.sleep(0.5)
    remove_placement_group(taken)
    run.join()
    assert results == ["done"]
    assert "for 2 workers with 1 CPU each: the cluster has 2 CPU (1 free)" in log.read_text()
    assert {path.name for path in log.parent.iterdir()} == {"controller.log", "rank-000.log", "rank-001.log"}
