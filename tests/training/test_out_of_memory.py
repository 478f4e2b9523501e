"""Too little memory for a micro-batch: one sentence with what takes less, on every rank, and no restarts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from model.transformer import Transformer
from pipeline.cluster import ray_cluster
from pipeline.cluster.workers import SharedFiles, WorkerOutcome, _run_worker
from pipeline.config.training import PretrainConfig
from pipeline.dataset.dataset import open_data
from pipeline.errors import UserError
from pipeline.storage.folders import as_folder
from pipeline.training import launch, trainer
from pipeline.training.batch_size import next_smaller, out_of_memory_explained, possible_sizes
from pipeline.training.trainer import Trainer
from tests.support import out_of_memory_workers as workers
from tests.support.memory_tracker import MemoryTracker
from tests.support.ranks import run_ranks
from tests.support.small_memory import small_memory
from tests.training.test_trainer import ALONE, CONFIG

SENTENCE = (
    "the device's memory does not hold a micro-batch of 3 windows of 32 tokens; give --batch_size 2, or "
    "--recompute blocks, which keeps far less for the backward pass; the same command with it goes on from the newest "
    "checkpoint"
)
BUILDING = (
    "the device's memory does not hold the network of {parameters:,} parameters and the optimizer's moments, "
    "divided among {workers} workers; give a smaller model or more workers"
)


@pytest.mark.parametrize(
    ("windows", "sizes"),
    [
        (1, [1]),
        (12, [1, 2, 3, 4, 6, 12]),
        (127, [1, 2, 4, 8, 16, 32, 64, 127]),
        (128, [1, 2, 4, 8, 16, 32, 64, 128]),
        (120, [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60, 120]),
    ],
)
def test_sizes_divide_the_windows_or_are_their_halves(windows: int, sizes: list[int]) -> None:
    assert possible_sizes(windows) == sizes


@pytest.mark.parametrize(
    ("batch_size", "world_size", "smaller"),
    [(500, 1, 6), (12, 1, 6), (8, 1, 4), (5, 1, 3), (2, 1, 1), (1, 1, None), (32, 5, 2), (32, 12, None)],
)
def test_the_next_smaller_size_makes_smaller_micro_batches(
    batch_size: int, world_size: int, smaller: int | None
) -> None:
    """Twelve windows a step: a micro-batch of at most 8 windows means two of 6, so the next is 4."""
    assert next_smaller(dataclasses.replace(CONFIG, batch_size=batch_size), world_size) == smaller


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 4}, "a micro-batch of 4 windows of 32 tokens; give --batch_size 3, or --recompute blocks"),
        ({"batch_size": 4, "recompute": "blocks"}, "give --batch_size 3; the same command"),
        ({"batch_size": 1}, "a micro-batch of 1 windows of 32 tokens; give --recompute blocks.*, or a smaller model"),
        ({"batch_size": 1, "recompute": "blocks"}, "give a smaller model, a shorter context_length or more workers;"),
    ],
)
def test_a_step_that_does_not_fit_is_one_sentence(
    changes: dict[str, Any], sentence: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformer, "forward", Transformer.forward)
    config = dataclasses.replace(CONFIG, **changes)
    trainer = Trainer(config, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    small_memory(config.micro_batch - 1, ranks=(0,))
    with pytest.raises(UserError, match=sentence):
        trainer.run()


def test_a_network_that_does_not_fit_is_one_sentence(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --batch_size auto too, which is found out once there is a network."""
    monkeypatch.setattr(trainer, "parallelize", workers.no_room)
    config = dataclasses.replace(CONFIG, batch_size="auto")
    with pytest.raises(UserError) as caught:
        Trainer(config, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    assert str(caught.value) == BUILDING.format(parameters=num_parameters(tiny_data), workers=1)


def num_parameters(data: Path) -> int:
    return CONFIG.model_config(open_data(as_folder(data))[1].vocab_size).num_parameters


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_other_ways_to_say_so_are_known_and_other_errors_pass(text: str) -> None:
    with pytest.raises(UserError, match="give --batch_size 1, or"), out_of_memory_explained(CONFIG, 1):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="Connection closed by peer"), out_of_memory_explained(CONFIG, 1):
        raise RuntimeError("Connection closed by peer")


def two_ranks(config: PretrainConfig, data: Path, tmp_path: Path, **fault: Any) -> subprocess.CompletedProcess[str]:
    settings = {"config": dataclasses.asdict(config), "data": str(data), "result": str(tmp_path / "result")}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**settings, "faults": {"memory": fault}}))
    return run_ranks("fault_process.py", file, world_size=2)


def test_every_rank_says_it(tiny_data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, output=str(tmp_path / "run"), batch_size=3)
    assert two_ranks(config, tiny_data, tmp_path, windows=2, ranks=[0, 1]).returncode == 0
    results = [json.loads((tmp_path / f"result.{rank}").read_text()) for rank in range(2)]
    assert [result["end"] for result in results] == [f"error: {SENTENCE}"] * 2
    assert not results[0]["losses"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a local Ray of two logical CPUs."""
    path = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT25_HOME", str(path))
        ray_cluster.connect(num_cpus=2)
        yield path
        ray_cluster.shut_down()


@pytest.mark.parametrize(
    ("worker", "max_failures"),
    [
        (workers.all_starved, 3),
        (workers.second_starved, 3),
        (workers.building_starved, 3),
        (workers.first_never_answers, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_under_ray_the_run_ends_with_the_sentence_and_without_another_start(
    worker: Any, max_failures: int, folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "pretrain_worker", worker)
    output = folder / worker.__name__
    config = dataclasses.replace(
        CONFIG, data=str(tiny_data), output=str(output), batch_size=3, num_workers=2, max_failures=max_failures
    )
    with pytest.raises(UserError) as caught:
        launch.pretrain(config)
    building = BUILDING.format(parameters=num_parameters(tiny_data), workers=2)
    assert str(caught.value) == (building if worker is workers.building_starved else SENTENCE)
    for rank in range(2):
        assert len(list(output.glob(f"start-{rank}-*"))) == 1
    run = json.loads((output / "mlflow_run.json").read_text())
    assert MlflowClient(run["tracking_uri"]).get_run(run["run_id"]).info.status == "FAILED"
    assert not list(output.glob("error-*"))


def test_a_group_that_starts_again_after_an_error_says_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "error-1").write_text(SENTENCE)
    files = SharedFiles(folder=str(tmp_path), error_file="error-1")

    def train(settings: None, files: SharedFiles) -> None:
        raise AssertionError("trained again")

    assert _run_worker(train, None, files) == WorkerOutcome(error=SENTENCE)
