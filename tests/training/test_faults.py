"""Faults inside the loop, on several ranks over gloo: healed, or ended in one sentence, the same on every rank."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.transformer import Transformer, init_weights
from pipeline.checkpoints.reader import list_checkpoints
from pipeline.dataset.batches import BatchOrder, micro_batches
from pipeline.dataset.dataset import open_data
from pipeline.dataset.shards import open_split
from pipeline.distributed.watchdog import EXIT_CODE
from pipeline.storage.folders import open_folder
from pipeline.training.optimizer import build_optimizer, learning_rate
from tests.support.ranks import run_ranks
from tests.training.test_trainer import ALONE, CONFIG, STEPS

BAD_STEP = 6
"""From 0; done as step 7."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Run:
    """Runs fault_process.py on several ranks; the results lie in result.RANK."""

    def start(world_size: int, output: str, *, data: Path = tiny_data, **settings: Any) -> Any:
        faults = settings.pop("faults", {})
        config = dataclasses.asdict(dataclasses.replace(CONFIG, output=str(tmp_path / output), **settings))
        file = tmp_path / "settings.json"
        result = str(tmp_path / "result")
        file.write_text(json.dumps({"config": config, "data": str(data), "faults": faults, "result": result}))
        return run_ranks("fault_process.py", file, world_size=world_size)

    return start


def results(tmp_path: Path, world_size: int) -> list[dict[str, Any]]:
    return [json.loads((tmp_path / f"result.{rank}").read_text()) for rank in range(world_size)]


def windows_of(data: Path, step: int) -> list[list[int]]:
    """The windows of each of two ranks at a step."""
    order = BatchOrder(
        num_windows=len(open_split(data, "train")) // 33, windows_per_step=12, batch_size=2, seed=CONFIG.seed
    )
    return [order.step_windows(step, rank, 2).tolist() for rank in range(2)]


def whole_tensors(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_folder / "checkpoints" / f"step-{step:06d}"
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("where", [pytest.param("loss", marks=pytest.mark.slow), "gradient"])
def test_a_step_that_is_not_finite_stops_every_rank_and_names_the_window(
    run: Run, tiny_data: Path, tmp_path: Path, where: str
) -> None:
    window = windows_of(tiny_data, BAD_STEP)[1][3]  # rank 1, second micro-batch
    finished = run(2, "run", faults={"poison": {"window": window, "in": where, "once": False}})
    assert finished.returncode == 0, finished.stderr
    first, second = results(tmp_path, 2)
    assert first["end"] == second["end"], "one sentence, on every rank"
    tokenizer, _ = open_data(open_folder(tiny_data))
    text = tokenizer.decode(open_split(tiny_data, "train").read(window * 33, 24).tolist())[:60]
    sentence = first["end"]
    assert sentence.startswith(f"error: the loss of step {BAD_STEP + 1} is ")
    assert f"the {where} of rank 1 on window {window} (train_00000" in sentence
    assert repr(text) in sentence and sentence.count("on window") == 1
    assert "--skip_nonfinite allows 0" in sentence
    assert [int(step) for step in first["losses"]] == list(range(1, BAD_STEP + 1))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]


@pytest.mark.slow
def test_a_step_left_out_is_as_if_it_had_not_been_and_the_count_survives_a_resume(
    run: Run, tiny_data: Path, tmp_path: Path
) -> None:
    window = windows_of(tiny_data, BAD_STEP)[0][0]
    fault = {"poison": {"window": window, "in": "loss", "once": False}}
    assert run(2, "run", skip_nonfinite=1, faults=fault).returncode == 0
    first, second = results(tmp_path, 2)
    assert (first["end"], second["end"], first["status"]) == ("done", "done", "FINISHED")
    assert first["skipped"] == [[BAD_STEP + 1, 1]]
    losses = {int(step): float.fromhex(loss) for step, loss in first["losses"].items()}
    assert losses == pytest.approx(reference_losses(tiny_data, left_out=BAD_STEP), rel=1e-4)

    # The run goes on from its checkpoint of step 10 and meets another such step: one too many.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}")
    window = windows_of(tiny_data, 10)[1][0]
    fault = {"poison": {"window": window, "in": "loss", "once": False}}
    assert run(2, "run", skip_nonfinite=1, faults=fault).returncode == 0
    assert "the loss of step 11 is nan" in results(tmp_path, 2)[0]["end"]
    assert "--skip_nonfinite allows 1" in results(tmp_path, 2)[0]["end"]


def reference_losses(data: Path, *, left_out: int) -> dict[int, float]:
    """Losses by step of a plain loop on one process that makes no update at one step."""
    _, manifest = open_data(open_folder(data))
    model = Transformer(CONFIG.model_config(manifest.vocab_size))
    init_weights(model, CONFIG.seed)
    optimizer = build_optimizer(model, CONFIG, ALONE)
    stream = open_split(data, "train")
    order = BatchOrder(num_windows=len(stream) // 33, windows_per_step=12, batch_size=12, seed=CONFIG.seed)
    losses = {}
    for step in range(STEPS):
        if step == left_out:
            continue
        (batch,) = micro_batches(
            stream, order, context_length=32, step=step, rank=0, world_size=1, device=torch.device("cpu")
        )
        loss = model(batch.inputs, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
    return losses


@pytest.mark.slow
def test_what_does_not_come_back_is_laid_to_the_machine(run: Run, tiny_data: Path, tmp_path: Path) -> None:
    window = windows_of(tiny_data, BAD_STEP)[1][0]
    assert run(2, "run", faults={"poison": {"window": window, "in": "loss", "once": True}}).returncode == 0
    assert "computed again they are finite" in results(tmp_path, 2)[1]["end"]


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_behind_a_checkpoint_and_the_rest_is_bit_for_bit(
    run: Run, tmp_path: Path
) -> None:
    assert run(2, "clean").returncode == 0
    clean = results(tmp_path, 2)[0]
    fault = {"signal": {"rank": 1, "step": 6, "number": int(signal.SIGTERM)}}
    assert run(2, "stopped", val_every=7, sample_every=7, faults=fault).returncode == 0
    first, second = results(tmp_path, 2)
    assert first["end"] == second["end"]
    assert first["end"] == f"stopped: stopped at step 7 of {STEPS}; the same command goes on from there"
    assert (first["status"], first["samples"]) == ("KILLED", [])
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == 7
    assert run(2, "stopped").returncode == 0
    resumed = results(tmp_path, 2)[0]
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if int(step) > 7}
    expected, found = (whole_tensors(tmp_path / name, STEPS) for name in ("clean", "stopped"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_signal_to_one_rank_in_a_long_step_makes_all_abandon_it(run: Run, tmp_path: Path) -> None:
    assert run(2, "clean").returncode == 0
    faults = {"signal": {"rank": 1, "step": 6, "number": int(signal.SIGTERM)}, "patience": {"seconds": -1}}
    assert run(2, "stopped", faults=faults).returncode == 0
    ends = {result["end"] for result in results(tmp_path, 2)}
    assert ends == {f"stopped: stopped at step 6 of {STEPS}; the same command goes on from there"}
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == 6
    assert run(2, "stopped").returncode == 0
    expected, found = (whole_tensors(tmp_path / name, STEPS) for name in ("clean", "stopped"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_others_with_their_stacks(run: Run, tmp_path: Path) -> None:
    fault = {"signal": {"rank": 1, "step": 4, "number": int(signal.SIGSTOP)}}
    finished = run(2, "run", collective_timeout=20, faults=fault)
    assert finished.returncode == EXIT_CODE
    assert "rank 0 stands still" in finished.stderr and "in step 5" in finished.stderr
    assert "rank 1 has been silent for" in finished.stderr
    assert "train_step" in finished.stderr and "Thread 0x" in finished.stderr, "the stack of the loop"


@pytest.mark.parametrize("do", [pytest.param("delete", marks=pytest.mark.slow), "flip"])
def test_a_shard_that_is_lost_or_damaged_ends_every_rank_with_its_name(
    run: Run, tiny_data: Path, tmp_path: Path, do: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = data / "train_000001.bin"
    if do == "flip":
        shard.write_bytes(_flipped(shard.read_bytes()))
        faults = {}
    else:
        faults = {"shard": {"rank": 0, "step": 0, "file": str(shard)}}
    assert run(2, "run", data=data, faults=faults, train_steps=10_000).returncode == 0
    first, second = results(tmp_path, 2)
    assert first["end"] == second["end"]
    what = "is damaged: its sha256 is" if do == "flip" else "is missing"
    assert first["end"].startswith(f"error: shard {shard} {what}") or "cannot be read any more" in first["end"]
    assert "run jobs/tokenize.py again" in first["end"]


def _flipped(content: bytes) -> bytes:
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


@pytest.mark.slow
def test_a_full_disk_ends_every_rank_soon_and_leaves_the_last_checkpoint_whole(run: Run, tmp_path: Path) -> None:
    fault = {"disk": {"rank": 1, "step": 8, "bytes": 1000}}  # of a file; the kernel itself refuses more
    constant = {"schedule": "wsd", "warmup_steps": 0, "warmup_fraction": None, "decay_fraction": 0.0}
    assert run(2, "run", faults=fault, train_steps=10_000, val_every=10_000, **constant).returncode == 0
    first, second = results(tmp_path, 2)
    assert first["end"] == second["end"]
    assert first["end"].startswith(f"error: {tmp_path / 'run' / 'checkpoints'}/step-000010.incomplete/")
    assert "cannot be written: File too large" in first["end"]
    assert max(map(int, first["losses"])) < 50, "it does not wait for the next checkpoint"
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]
    assert run(2, "run", **constant).returncode == 0  # fewer steps would bend a cosine
    resumed = results(tmp_path, 2)[0]
    assert resumed["end"] == "done" and min(map(int, resumed["losses"])) == 6
