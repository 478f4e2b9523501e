"""The benchmarks of the training step run from end to end, tiny; what they measure is not judged."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import overhead, train_step, train_step_models, training
from benchmarks.gpu_parts import FIRST_CALL
from benchmarks.gpu_run import Log, Process, run_part
from benchmarks.results import Results, read_results
from benchmarks.train_step_report import Report
from pipeline.distributed.process_group import init_distributed
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker

ROOT = Path(__file__).resolve().parents[1]

BLOCK_IMPORTS = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {blocked} else find(name, *rest)
"""


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as cores: init_distributed gives each one thread, as the tests' other networks have."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))


def environment_without(folder: Path, *blocked: str) -> dict[str, str]:
    """Of a process that, with all its children, does not find these packages."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK_IMPORTS.format(blocked=set(blocked)))
    return {**os.environ, "PYTHONPATH": str(folder)}


def rehearse(kind: str, data: Path, output: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(output), "--data", str(data), "--rehearse", kind]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["gpu.jsonl", "gpu.log"]
    assert (output / "gpu.log").read_text() == result.stdout
    return read_results(output / "gpu.jsonl")


def check_rehearsal(rows: list[dict[str, Any]]) -> None:
    def of(kind: str, part: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["result"] == kind and row["part"] == part]

    ends = [(row["part"], row["status"]) for row in rows if row["result"] == "end"]
    assert ends == [(part, "done") for part in (*FIRST_CALL, "training adamw", "training muon")]
    assert [row["name"] for row in of("speed", "headline")] == ["ours compiled", "llama compiled"]
    assert [row["deterministic"] for row in of("speed", "nondeterministic")] == [False]
    assert [row["micro_batch"] for row in of("speed", "batch64")] == [4]
    assert [row["fsdp"] for row in of("speed", "fsdp2")] == [True]
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in rows if row["result"] == "speed")
    assert of("ratio", "headline")[0]["times_as_fast"] > 0
    assert all(row["good"] for row in of("check", "correctness")) and len(of("check", "correctness")) >= 15
    ways = {row["way"] for row in of("embedding gradient", "embedding")}
    assert {"index_put_ accumulate", "embedding_dense_backward"} < ways
    assert all(row["same_bits"] and row["error"] < 0.01 for row in of("embedding gradient", "embedding"))
    for optimizer in ("adamw", "muon"):
        losses = [row["train/loss"] for row in of("metrics", f"training {optimizer}") if "train/loss" in row]
        (result,) = of("training", f"training {optimizer}")
        assert losses[-1] < losses[0] and result["steps"] == 10 and math.isfinite(result["val_loss"])


def test_both_calls_for_a_gpu_machine_run_on_a_cpu_without_ray_and_mlflow(tiny_data: Path, tmp_path: Path) -> None:
    blocked = ("ray", "mlflow", "obstore", "tyro")
    environment = environment_without(tmp_path / "site", *blocked)
    for name in blocked:
        found = subprocess.run(
            [sys.executable, "-c", f"import {name}"], env=environment, capture_output=True, check=False
        )
        assert found.returncode != 0
    rows = rehearse("quick", tiny_data, tmp_path / "output", environment)
    check_rehearsal(rows)
    ours = next(row["seconds"] for row in rows if row["result"] == "profile" and row["name"] == "ours compiled")
    assert set(ours) == {
        "matrix products", "attention", "loss", "norm and element-wise", "optimizer", "gaps", "step",
    }  # fmt: skip
    assert sum(seconds for name, seconds in ours.items() if name != "step") == pytest.approx(ours["step"], rel=0.05)
    assert all(ours[name] > 0 for name in ("matrix products", "attention", "loss", "optimizer"))


@pytest.mark.slow
def test_both_calls_run_compiled(tiny_data: Path, tmp_path: Path) -> None:
    check_rehearsal(rehearse("full", tiny_data, tmp_path / "output", dict(os.environ)))


def test_a_part_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl", "part")
    code = "import sys; print('found', flush=True); sys.exit(3)"
    with Log(tmp_path / "log") as log:
        assert not run_part(Process([sys.executable, "-c", code], 500, dict(os.environ)), results, log)
        assert not run_part(Process([sys.executable, "-c", code], -1, dict(os.environ)), results, log)
        assert run_part(Process([sys.executable, "-c", "print('next')"], 500, dict(os.environ)), results, log)
    assert [row["status"] for row in read_results(tmp_path / "results.jsonl") if row["result"] == "end"] == [
        "failed with 3",
        "left out",
        "done",
    ]
    assert {"found", "next"} < set((tmp_path / "log").read_text().splitlines())


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    hangs = ["sh", "-c", "sleep 100000 & echo $!; wait"]
    for limit in (1, 10, 100):  # until it was long enough for the shell to begin
        results = Results(tmp_path / "results.jsonl", "part")
        with Log(tmp_path / "log") as log:
            assert not run_part(Process(hangs, limit, dict(os.environ)), results, log)
        assert read_results(tmp_path / "results.jsonl")[-1]["status"] == "stopped at its time limit"
        started = [int(line) for line in (tmp_path / "log").read_text().splitlines() if line.isdigit()]
        if started:
            break
    state = Path(f"/proc/{started[-1]}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_command_when_ended_ends_its_part_too(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "benchmarks/gpu.py", "--output", str(tmp_path), "--rehearse", "quick"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "python" in line and line.startswith("{"):  # the part headline has begun to measure
                break
        parts = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    assert parts and not psutil.wait_procs(parts, timeout=1200)[1]


def tiny_setting(micro_batch: int = 1) -> train_step_models.Setting:
    return train_step_models.Setting(
        config=train_step_models.PRESETS["tiny"],
        micro_batch=micro_batch,
        dtype=torch.float32,
        workers=init_distributed("cpu"),
    )


def test_a_contestant_that_fails_leaves_the_others_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(train_step_models, "llama", fail)
    results = Results(tmp_path / "results.jsonl")
    arguments = argparse.Namespace(contestants=["llama", "ours"], repeats=2, steps=1, profile="off")
    train_step.measure(arguments, Report(tiny_setting(), 1e12, results))
    assert results.failures == ["llama"]
    found = [(row["result"], row.get("name", row.get("what"))) for row in read_results(tmp_path / "results.jsonl")]
    ours = [(kind, "ours") for kind in ("first steps", "turn", "turn", "speed")]
    assert found == [("failure", "llama"), *ours]


def test_a_peer_is_compiled_for_each_size_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        inputs.append(example_inputs)
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **settings: compile(model, backend=backend, **settings))
    for micro_batch in (1, 2, 3):
        train_step_models.make_step("llama compiled", tiny_setting(micro_batch))()
    torch._dynamo.reset()
    sizes = {size for values in inputs for value in values if isinstance(value, torch.Tensor) for size in value.shape}
    assert {1, 2, 3} <= sizes
    assert not any(isinstance(size, torch.SymInt) for size in sizes)
    assert not any(isinstance(value, torch.SymInt) for values in inputs for value in values)


def test_a_sample_that_cannot_be_drawn_loses_nothing_else(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr("pipeline.training.periodic_evaluation.continue_text", fail)
    results = Results(tmp_path / "results.jsonl")
    arguments = argparse.Namespace(
        size="tiny", optimizer="muon", device="cpu", batch_size=None, tokens_per_step=None, lr=None
    )
    training.train(training.run_config(arguments), tiny_data, tmp_path / "run", results)
    assert results.failures == ["training with muon"]
    rows = read_results(tmp_path / "results.jsonl")
    (result,) = (row for row in rows if row["result"] == "training")
    told = [row["val/loss"] for row in rows if "val/loss" in row]
    assert result["steps"] == 10 and result["val_loss"] == told[-1] and math.isfinite(told[-1])


def test_the_bare_step_is_the_trainers_step(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextmanager
    def deterministic(_: torch.device, *, enabled: bool = True) -> Iterator[None]:
        inside.append("entered")
        yield
        inside.append("left")

    monkeypatch.setattr(overhead, "deterministic", deterministic)
    workers = init_distributed("cpu")
    arguments = argparse.Namespace(size="tiny", compile="off", checkpoint_every=1000)
    config = overhead.run_config(arguments, workers, tmp_path)
    trainer = Trainer(config, data=tiny_data, output=tmp_path / "run", workers=workers, tracker=MemoryTracker())
    bare = overhead.BareStep(config, trainer, workers)
    trainer.train_step(0)
    for group, like in zip(bare.optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
        group["lr"] = like["lr"]
    bare()
    assert inside == ["entered", "left"]
    for ours, theirs in zip(bare.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_step_benchmark_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys; sys.argv = ['x', '--preset', 'tiny', '--contestants', 'ours', '--repeats', '1']\n"
        "for name in ('ray', 'mlflow', 'tyro', 'numba', 'pyarrow', 'transformers'): sys.modules[name] = None\n"
        "import runpy; runpy.run_path('benchmarks/train_step.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "matrix products" in result.stdout
