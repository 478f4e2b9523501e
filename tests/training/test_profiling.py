"""--profile_steps: a trace and a table of exactly these steps, in the run's folder and in MLflow."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, open_folder
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.training.profiling import StepProfiler
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker
from tests.support.s3_server import S3
from tests.training.test_trainer import ALONE, CONFIG, train_here

NAMES = ["profile/trace-steps-3-4.json.gz", "profile/operations-steps-3-4.txt"]
MICRO_BATCHES = 6


def optimizer_steps(trace: bytes) -> int:
    """How many whole steps of the run a trace has, by the backward passes in it."""
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    return sum(event.get("name") == "_LinearCrossEntropyBackward" for event in events) // MICRO_BATCHES


def test_the_steps_asked_for_are_profiled_and_nothing_changes(tiny_data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, profile_steps="3:4")
    _, plain = train_here(CONFIG, tiny_data, tmp_path / "plain")
    _, tracker = train_here(config, tiny_data, tmp_path / "run")
    assert tracker.metrics["train/loss"] == plain.metrics["train/loss"]
    assert tracker.pages == NAMES
    folder = open_folder(tmp_path / "run")
    assert folder.names("profile") == sorted(NAMES)
    assert optimizer_steps(folder.read(NAMES[0])) == 2
    assert "aten::mm" in folder.read(NAMES[1]).decode()
    assert not plain.pages and not (tmp_path / "plain" / "profile").exists()


def test_a_run_in_a_bucket_has_them_there_and_in_mlflow(tiny_data: Path, tmp_path: Path, s3: S3) -> None:
    output = open_folder(f"{s3.url}/profiled")
    run = open_run(
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        experiment="test",
        folder=output,
        working_folder=tmp_path,
        job="pretrain",
        reopen=True,
    )
    config = dataclasses.replace(CONFIG, profile_steps="3:4")
    tracker = MLflowTracker(run, output)
    Trainer(config, data=tiny_data, output=output, workers=ALONE, tracker=tracker).run()
    check(output, run.tracking_uri, run.run_id)


def check(output: Folder, tracking_uri: str, run_id: str) -> None:
    client = MlflowClient(tracking_uri)
    assert sorted(item.path for item in client.list_artifacts(run_id, "profile")) == sorted(NAMES)
    for name in NAMES:
        assert Path(client.download_artifacts(run_id, name)).read_bytes() == output.read(name)


def profiler(folder: Path, *, rank: int = 0) -> tuple[StepProfiler, MemoryTracker]:
    config, tracker = dataclasses.replace(CONFIG, profile_steps="3:4"), MemoryTracker()
    workers = ProcessGroup(rank=rank, world_size=2, device=ALONE.device)
    return StepProfiler(config, output=open_folder(folder), workers=workers, tracker=tracker), tracker


def test_a_run_that_goes_on_amid_the_steps_has_the_rest_of_them(tmp_path: Path) -> None:
    steps, tracker = profiler(tmp_path)
    with steps:
        for number in (4, 5):
            with steps.step(number):
                pass
    assert tracker.pages == ["profile/trace-steps-4-4.json.gz", "profile/operations-steps-4-4.txt"]


def test_a_run_that_ends_amid_the_steps_has_no_profile_and_the_next_one_can_start(tmp_path: Path) -> None:
    for _ in range(2):
        steps, tracker = profiler(tmp_path)
        with pytest.raises(UserError, match="the end"), steps, steps.step(3):
            raise UserError("the end")
        assert not tracker.pages and not open_folder(tmp_path).names("profile")


def test_only_the_first_rank_profiles(tmp_path: Path) -> None:
    steps, tracker = profiler(tmp_path, rank=1)
    with steps:
        for number in (3, 4):
            with steps.step(number):
                pass
    assert not tracker.pages and not open_folder(tmp_path).names("profile")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("20", "profile_steps is 20; give the first and the last step, for instance 20:25"),
        ("-1:3", "profile_steps is -1:3; give the first"),
        ("0:3", "both must lie between 1 and train_steps 12"),
        ("4:3", "the first step must not come after the last"),
        ("3:13", "both must lie between 1 and train_steps 12"),
    ],
)
def test_steps_that_make_no_sense_are_one_sentence(asked: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PretrainConfig(train_steps=12, profile_steps=asked)
