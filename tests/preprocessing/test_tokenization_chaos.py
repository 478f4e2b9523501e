"""Tokenization on three nodes, while workers, nodes and drivers are killed: the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.verification import verify
from pipeline.preprocessing import resume_state, stages, tokenization
from pipeline.preprocessing.progress import ItemProgress
from pipeline.preprocessing.rows import ItemRow
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from tests.support import tokenizing_process
from tests.support.fixtures import ROOT, contents
from tests.support.s3_server import S3, Fault, FaultyProxy, environment

KILLS = ["worker"] * 4 + ["node"] * 3 + ["driver"] * 3
SEED = int(os.environ.get("CHAOS_SEED", "2000"))
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def three_nodes(s3_endpoint: FaultyProxy) -> Iterator[Cluster]:
    """One CPU each; nobody is connected."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_endpoint.url).items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("ray._private.utils.write_ray_address", "ray._common.utils.reset_ray_address"):
            patch.setattr(name, lambda *values: None)  # else every ray.init() on this machine would join the cluster
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def connected(three_nodes: Cluster) -> Iterator[None]:
    """This process is a driver."""
    ray.init(address=three_nodes.address, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path: Path, documents: list[str]) -> TokenizeConfig:
    """Some 200 items of a few documents."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(0, len(documents), 2):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number : number + 2]]
        (folder / f"{number:03d}.jsonl").write_text("".join(lines))
    bpe_training.train_bpe(documents, 300).save(tmp_path / "tokenizer.json")
    return TokenizeConfig(
        source=str(folder), tokenizer=str(tmp_path / "tokenizer.json"), item_bytes=1, val_fraction=0.2
    )


@pytest.fixture
def expected(config: TokenizeConfig, connected: None, tmp_path: Path) -> dict[str, str]:
    """What one worker writes that nothing disturbs."""
    tokenization.tokenize(dataclasses.replace(config, num_workers=1), open_folder(tmp_path / "one"))
    return contents(tmp_path / "one")


def require_whole(output: Path, expected: dict[str, str]) -> None:
    """Every file, byte by byte, and no other."""
    assert verify(output) == []
    assert contents(output) == expected
    assert not list(output.rglob(".tmp-*"))


def test_three_nodes_and_shuffled_completion(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, nodes = [], tmp_path / "nodes"
    nodes.mkdir()
    add = ItemProgress.add

    def noted_add(self: ItemProgress, index: int, *figures: int, is_last: bool) -> None:
        order.append(index)
        add(self, index, *figures, is_last=is_last)

    def noted_encode(table: Any, **arguments: Any) -> Any:
        (nodes / ray.get_runtime_context().get_node_id()).touch()
        yield from slow_encode(table, **arguments)

    slow_encode = tokenizing_process.slowly("encode", 0.3, "")
    monkeypatch.setattr(ItemProgress, "add", noted_add)
    monkeypatch.setattr(stages, "encode", noted_encode)
    tokenization.tokenize(config, open_folder(tmp_path / "out"))
    assert len(list(nodes.iterdir())) == 3
    assert order != sorted(order) and sorted(order) == list(range(len(order)))
    require_whole(tmp_path / "out", expected)


def test_killed_between_shards_and_record(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, write = tmp_path / "killed once", stages.write

    def dying_write(table: Any, **arguments: Any) -> Any:
        def die(folder: Any, index: int, part: int, record: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if ItemRow.from_table(table).work_item.index == 7 and not marker.exists():
            marker.touch()
            resume_state.write_item = die
        return write(table, **arguments)

    monkeypatch.setattr(stages, "write", dying_write)
    tokenization.tokenize(config, open_folder(tmp_path / "out"))
    assert marker.exists()
    require_whole(tmp_path / "out", expected)


def test_an_item_that_kills_its_worker_is_left_out_alone(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task takes several items when they are small; those before the bad one are not given up with it."""

    def dying_encode(table: Any, **arguments: Any) -> Any:
        for result in encode(table, **arguments):
            row = ItemRow.from_table(result)
            if row.work_item.index == 5 and any(row.figures["documents"].values()):  # none when it is given up
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

    encode = stages.encode
    monkeypatch.setattr(stages, "encode", dying_encode)
    output = tmp_path / "out"
    tokenization.tokenize(dataclasses.replace(config, skip_bad_files=True), open_folder(output))
    manifest = Manifest.load(open_folder(output))
    (damaged,) = manifest.damaged
    assert damaged["name"].startswith("010.jsonl") and "its worker was killed 3 times" in damaged["reason"]
    found = contents(output)
    missing = {name for name in expected if name.endswith(".bin")} - found.keys()
    assert missing and missing <= {"train_000005.bin", "val_000005.bin"}
    assert all(expected[name] == value for name, value in found.items() if name.endswith(".bin"))


def test_object_store_that_refuses_for_a_while(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request of every worker is answered 503 for three seconds, in the middle of the run."""
    add, seen = ItemProgress.add, []

    def heal() -> None:
        seen.append(len(s3.requests))
        s3.proxy.faults.clear()

    healed = threading.Timer(3, heal)

    def noted_add(self: ItemProgress, *figures: int, is_last: bool) -> None:
        add(self, *figures, is_last=is_last)
        if self._items == 10:
            seen.append(len(s3.requests))
            s3.fail(Fault(status=503), times=100_000)
            healed.start()

    monkeypatch.setattr(ItemProgress, "add", noted_add)
    few = dataclasses.replace(config, limit_documents=80)
    output = open_folder(f"{s3.url}/shards")
    tokenization.tokenize(few, output)
    healed.join()
    assert seen[1] - seen[0] >= 3, "no request was refused"
    assert verify(output) == []
    found = s3.objects()
    shards = {name for name in expected if name.endswith(".bin") and name[-10:-4] < "000040"}
    assert {f"shards/{name}" for name in shards} == {key for key in found if key.endswith(".bin")}
    for name in shards:
        assert found[f"shards/{name}"] == (tmp_path / "one" / name).read_bytes()
    assert not s3.unfinished_uploads() and not [key for key in found if ".tmp-" in key]


# ---- ten kills -------------------------------------------------------------------------------------------------------


class Chaos:
    """A driver, and what is killed while it runs."""

    def __init__(self, cluster: Cluster, command: list[str], log_path: Path) -> None:
        self._cluster, self._command, self.log_path = cluster, command, log_path
        self._choose = random.Random(SEED)
        self._nodes = sorted(cluster.worker_nodes, key=lambda node: str(node.node_id))
        self._start = time.monotonic()
        self.log = [f"CHAOS_SEED={SEED}"]
        self.driver = self.start_driver()

    def start_driver(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as file:
            return subprocess.Popen(self._command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def kinds(self) -> list[str]:
        """In random order, but one item's worker is not killed three times under one driver: then it is given up."""
        while True:
            kinds = self._choose.sample(KILLS, len(KILLS))
            lives = " ".join(kinds).split("driver")
            if all(life.count("worker") < resume_state.MAX_ATTEMPTS for life in lives):
                return kinds

    def workers(self) -> list[psutil.Process]:
        """Processes that run our tasks now, by the title that Ray gives them."""
        found = []
        for node in self._cluster.list_all_nodes():
            (raylet,) = node.all_processes["raylet"]
            for process in psutil.Process(raylet.process.pid).children(recursive=True):
                try:
                    if "MapBatches" in " ".join(process.cmdline()):
                        found.append(process)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
        return sorted(found, key=lambda process: process.pid)

    def wait_for_work(self) -> list[psutil.Process]:
        deadline = time.monotonic() + 1200
        while not (workers := self.workers()):
            self.require_running()
            assert time.monotonic() < deadline, self.story("nobody works")
            time.sleep(0.1)
        return workers

    def kill(self, kind: str) -> None:
        """At a random moment of the work."""
        self.wait_for_work()
        time.sleep(self._choose.uniform(0.2, 3))
        self.require_running()
        if kind == "worker":
            victim = self._choose.choice(self.wait_for_work())
            self.note(f"worker {victim.pid}")
            victim.kill()
        elif kind == "driver":
            self.note(f"driver {self.driver.pid}")
            self.driver.kill()
            self.driver.wait()
            self.driver = self.start_driver()
        else:
            victim = self._nodes.pop(self._choose.randrange(len(self._nodes)))
            self.note(f"node {victim.node_id}")
            self._cluster.remove_node(victim, allow_graceful=False)
            self._nodes.append(self._cluster.add_node(**NODE))

    def note(self, victim: str) -> None:
        self.log.append(f"{time.monotonic() - self._start:6.1f} s: {victim}")

    def require_running(self) -> None:
        assert self.driver.poll() is None, self.story(f"the driver ended with {self.driver.poll()}")

    def story(self, end: str) -> str:
        return "\n".join([*self.log, end, self.log_path.read_text(errors="replace")[-5000:]])


@pytest.mark.timeout(2400)
def test_ten_kills(config: TokenizeConfig, expected: dict[str, str], three_nodes: Cluster, tmp_path: Path) -> None:
    ray.shutdown()
    output, hurry = tmp_path / "out", tmp_path / "hurry"
    settings = json.dumps(dataclasses.asdict(dataclasses.replace(config, output=str(output))))
    command = [sys.executable, "-m", tokenizing_process.__name__, settings, "0.3", str(hurry)]
    chaos = Chaos(three_nodes, command, tmp_path / "driver.log")
    try:
        for kind in chaos.kinds():
            chaos.kill(kind)
        hurry.touch()
        status = chaos.driver.wait(1200)
    finally:
        chaos.driver.kill()
        chaos.driver.wait()
    story = chaos.story(f"the last driver ended with {status}")
    assert status == 0, story
    try:
        require_whole(output, expected)
        (num_done_last,) = map(int, re.findall(r"items done by this driver: (\d+)", chaos.log_path.read_text()))
        assert 0 < num_done_last < len(list(Path(config.source).iterdir())), "nothing outlived a kill"
    except AssertionError as error:
        error.add_note(story)
        raise
