"""The benchmarks of the training step run from end to end, tiny; what they measure is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_gpu_benchmark(data: Path, output: Path, *parts: str) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(output), "--data", str(data), "--minutes", "0"]
    command += ["--parts", *parts] if parts else []
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    printed = "".join(path.read_text() for path in sorted(output.glob("*.txt")))
    assert result.returncode == 0, result.stdout + result.stderr + printed


def test_the_one_command_for_a_gpu_machine_runs_its_parts(tiny_data: Path, tmp_path: Path) -> None:
    run_gpu_benchmark(tiny_data, tmp_path, "fsdp", "training")
    (row,) = json.loads((tmp_path / "fsdp.json").read_text())["runs"][0]["results"]
    assert row["name"] == "ours" and row["tokens_per_second"] > 0 and row["mfu"] > 0
    profile = row["profile_seconds"]
    assert set(profile) == {
        "matrix products", "attention", "loss", "norm and element-wise", "optimizer", "gaps", "step",
    }  # fmt: skip
    parts = sum(seconds for name, seconds in profile.items() if name != "step")
    assert parts == pytest.approx(profile["step"], rel=0.05)
    assert all(profile[name] > 0 for name in ("matrix products", "attention", "loss", "optimizer"))
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["steps"] == 10 and training["last_loss"] < training["first_loss"]


@pytest.mark.slow
def test_all_its_parts_run(tiny_data: Path, tmp_path: Path) -> None:
    run_gpu_benchmark(tiny_data, tmp_path)
    run = json.loads((tmp_path / "steps.json").read_text())["runs"][-1]
    assert [row["name"] for row in run["results"]] == ["ours", "llama", "gpt2"]
    assert len(json.loads((tmp_path / "overhead.json").read_text())["overheads"]) == 1
    assert "FAIL" not in (tmp_path / "correctness.txt").read_text()


def test_the_step_benchmark_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys; sys.argv = ['x', '--preset', 'tiny', '--contestants', 'ours', '--repeats', '1']\n"
        "for name in ('ray', 'mlflow', 'tyro', 'numba', 'pyarrow', 'transformers'): sys.modules[name] = None\n"
        "import runpy; runpy.run_path('benchmarks/train_step.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "matrix products" in result.stdout
