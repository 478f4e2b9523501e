"""--batch_size auto: the largest size that fits, the same on all ranks and after a resume; nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.reader import newest_info
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.run_files import BATCH_SIZES_FILE
from pipeline.storage.folders import open_folder
from pipeline.training import largest_batch
from pipeline.training.batch_size import possible_sizes
from pipeline.training.largest_batch import largest_that_fits
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker
from tests.support.ranks import run_ranks
from tests.support.small_memory import StandIn
from tests.training.test_trainer import ALONE, CONFIG, checkpoint_tensors, train_here

AUTO = dataclasses.replace(CONFIG, batch_size="auto")


def alone(number: int) -> int:
    return number


@given(windows=st.integers(1, 600), base=st.integers(0, 1000), slope=st.integers(1, 50), limit=st.integers(0, 40_000))
def test_the_largest_size_within_the_limit_is_found(windows: int, base: int, slope: int, limit: int) -> None:
    sizes = possible_sizes(windows)
    fits = [size for size in sizes if base + slope * size <= limit]
    if fits:
        assert largest_that_fits(sizes, lambda size: base + slope * size, limit=limit, min_over_ranks=alone) == fits[-1]
    else:
        with pytest.raises(UserError, match="give --recompute blocks, more workers, a smaller model or a shorter"):
            largest_that_fits(sizes, lambda size: base + slope * size, limit=limit, min_over_ranks=alone)


@given(windows=st.integers(1, 600), limit=st.integers(10, 40_000), bend=st.integers(1, 100), more=st.integers(0, 60))
def test_nor_does_a_line_that_bends_mislead(windows: int, limit: int, bend: int, more: int) -> None:
    """Memory grows faster or slower beyond a size; what is found fits, and was measured."""
    measured: dict[int, int] = {}

    def measure(size: int) -> int:
        measured[size] = 5 * min(size, bend) + more * max(0, size - bend)
        return measured[size]

    found = largest_that_fits(possible_sizes(windows), measure, limit=limit, min_over_ranks=alone)
    assert found == max(size for size, taken in measured.items() if taken <= limit)
    assert all(later <= 8 * max(list(measured)[:place]) for place, later in enumerate(measured) if place > 1)


def test_ranks_measure_the_same_sizes_and_agree_on_what_fits_on_all() -> None:
    """The first rank has half the memory of the second: neither waits for the other in a collective of its own."""
    results: list[tuple[int, list[int]]] = []
    meeting, said = threading.Barrier(2, timeout=1200), [0, 0]

    def run(rank: int, limit: int) -> tuple[int, list[int]]:
        measured: list[int] = []

        def agree(number: int) -> int:
            said[rank] = number
            meeting.wait()
            smallest = min(said)
            meeting.wait()
            return smallest

        def measure(size: int) -> int:
            measured.append(size)
            return 10 + size

        return largest_that_fits(possible_sizes(512), measure, limit=limit, min_over_ranks=agree), measured

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(run, rank, limit) for rank, limit in enumerate((80, 150))]
        results = [future.result(300) for future in futures]
    assert results[0] == results[1]
    assert results[0][0] == 64


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], StandIn]]:
    """Gives this process a device with a memory of so many bytes."""
    devices = [StandIn(0)]
    monkeypatch.setattr(largest_batch, "device_memory", lambda device: devices[-1])

    def make(limit: int) -> StandIn:
        devices.append(StandIn(limit))
        return devices[-1]

    def keep(tensor: Tensor) -> Tensor:
        return devices[-1].keep(tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield make


def needed(size: int, made: Trainer, memory: Callable[[int], StandIn]) -> int:
    """Bytes that two micro-batches of ``size`` windows take."""
    return largest_batch.measure(made.config, made.model, ALONE, memory(0), size)


def trainer(config: PretrainConfig, data: Path, output: Path) -> Trainer:
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=MemoryTracker())


def test_a_run_is_that_with_the_number_bit_for_bit(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    memory(needed(5, trainer(CONFIG, tiny_data, tmp_path / "sized"), memory))
    _, tracker = train_here(AUTO, tiny_data, tmp_path / "auto")
    found = tracker.params["batch_size"]
    assert found == 4
    _, plain = train_here(dataclasses.replace(CONFIG, batch_size=found), tiny_data, tmp_path / "plain")
    assert tracker.metrics["train/loss"] == plain.metrics["train/loss"]
    expected, ours = (checkpoint_tensors(tmp_path / name) for name in ("plain", "auto"))
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    assert newest(tmp_path / "auto").config["batch_size"] == found


def newest(run: Path) -> CheckpointInfo:
    found = newest_info(open_folder(run / "checkpoints"))
    assert found is not None
    return found[1]


def test_looking_for_the_size_draws_no_random_number_and_leaves_no_gradient(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    memory(10**9)
    states = []
    for config in (AUTO, dataclasses.replace(CONFIG, batch_size=12)):
        torch.manual_seed(7)
        made = trainer(config, tiny_data, tmp_path / str(config.batch_size))
        states.append((torch.get_rng_state(), [p.detach().clone() for p in made.model.parameters()]))
        assert all(parameter.grad is None for parameter in made.model.parameters())
        assert made.config.batch_size == 12
        assert made.optimizer.num_steps == 0
    assert torch.equal(states[0][0], states[1][0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states[0][1], states[1][1], strict=True))


def test_a_resumed_run_takes_the_size_that_was_found_whatever_fits_now(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    memory(10**9)
    assert trainer(AUTO, tiny_data, tmp_path).config.batch_size == 12
    assert json.loads((tmp_path / BATCH_SIZES_FILE).read_text())[0]["batch_size"] == 12
    memory(0)
    assert trainer(AUTO, tiny_data, tmp_path).config.batch_size == 12


def test_other_settings_that_memory_depends_on_are_measured_anew_and_both_are_kept(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    memory(10**9)
    trainer(AUTO, tiny_data, tmp_path)
    again = dataclasses.replace(AUTO, recompute="blocks")
    sized = trainer(dataclasses.replace(again, batch_size=1), tiny_data, tmp_path / "sized")
    memory(needed(5, sized, memory))
    assert trainer(again, tiny_data, tmp_path).config.batch_size == 4
    assert trainer(AUTO, tiny_data, tmp_path).config.batch_size == 12


def test_too_little_for_one_window_is_one_sentence(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    memory(10)
    with pytest.raises(UserError, match=r"a micro-batch of one window takes .+ GiB, and .+ GiB of the GPU's memory"):
        trainer(AUTO, tiny_data, tmp_path)


@pytest.mark.parametrize(("windows", "expected"), [(12, 12), (100, 25), (64, 32)])
def test_on_a_cpu_it_is_the_recipes_size_or_what_a_step_has(
    windows: int, expected: int, tiny_data: Path, tmp_path: Path
) -> None:
    made = trainer(dataclasses.replace(AUTO, tokens_per_step=32 * windows), tiny_data, tmp_path)
    assert made.config.batch_size == expected
    assert not (tmp_path / BATCH_SIZES_FILE).exists()


def two_ranks(config: PretrainConfig, data: Path, folder: Path, *limits: int) -> list[dict[str, Any]]:
    """What fault_process.py writes, by rank; the ranks' devices have memories of ``limits`` bytes."""
    settings = {"config": dataclasses.asdict(config), "data": str(data), "result": str(folder / "result")}
    file = folder / "settings.json"
    file.write_text(json.dumps({**settings, "faults": {"device": {"bytes": limits}} if limits else {}}))
    done = run_ranks("fault_process.py", file, world_size=2)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(2)]


def test_two_ranks_take_what_fits_on_both_and_go_on_with_it(
    tiny_data: Path, tmp_path: Path, memory: Callable[[int], StandIn]
) -> None:
    """Six windows a step and rank; the second rank has room for two of them, which the first then takes too."""
    sized = trainer(CONFIG, tiny_data, tmp_path / "sized")
    limits = (needed(6, sized, memory), needed(2, sized, memory))
    plain = two_ranks(dataclasses.replace(CONFIG, output=str(tmp_path / "plain")), tiny_data, tmp_path)
    auto = dataclasses.replace(AUTO, output=str(tmp_path / "auto"))
    found = two_ranks(auto, tiny_data, tmp_path, *limits)
    assert [result["end"] for result in found] == ["done", "done"]
    assert found[0]["losses"] == plain[0]["losses"], "CONFIG has two windows a micro-batch"
    expected = checkpoint_tensors(tmp_path / "auto")
    shutil.rmtree(tmp_path / "auto" / "checkpoints" / "step-000012")
    resumed = two_ranks(auto, tiny_data, tmp_path, *limits)
    assert resumed[0]["losses"] == {step: found[0]["losses"][step] for step in ("11", "12")}
    again = checkpoint_tensors(tmp_path / "auto")
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_auto_and_a_number_of_micro_batches_contradict_each_other() -> None:
    settings: dict[str, Any] = {"batch_size": "auto", "grad_accum_steps": 4}
    with pytest.raises(UserError, match="grad_accum_steps 4 says what batch_size auto is to find out; give one"):
        PretrainConfig(**settings)
