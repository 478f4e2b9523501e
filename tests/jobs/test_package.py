"""What `ray job submit --working-dir .` uploads, by Ray's own packaging: the code, and nothing that jobs have made."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[2]
CODE = ("jobs", "model", "pipeline", "configs")
MOST_BYTES = 2_000_000
MADE = (
    "runs/mine/checkpoints/step-000500/shard-00001-model-00001-of-00001.safetensors",
    "runs/mine/tracking.jsonl",
    "runs/mine/logs/rank-000.log.1",
    "runs/mine/report.html",
    "export/mine/model.safetensors",
    "exports/mine/README.md",
    "my-model/model-00001-of-00002.safetensors",
    "my-model/config.json",
    "my-model/a.gguf",
    "my-model/Modelfile",
    "Dockerfile",
    "data/mine/train_000000.bin",
    "shards of mine/val_000000.bin",
    "texts/part-000.parquet",
    "texts/stories.txt",
    "texts/more/a.jsonl.zst",
    "sweeps/lr/plan.json",
    "sweeps/lr/trial-000/report.html",
    "mlflow.db",
    "mlartifacts/1/a/samples.json",
    ".venv/lib/python3.11/site-packages/torch/__init__.py",
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package of a checkout in which jobs have run, a megabyte in each of their files."""
    checkout = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in [name for name in listed.split("\0") if (ROOT / name).is_file()]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in MADE:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(1_000_000))
    (checkout / "experiments").mkdir()
    (checkout / "experiments/mine.yaml").write_text("pretrain: {train_steps: 7}\n")
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    return tmp_path / "package.zip"


def test_the_package_is_the_code(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package) as found:
        names = {name for name in found.namelist() if not name.endswith("/")}
        found.extractall(tmp_path / "job")
    assert not names & set(MADE)
    assert package.stat().st_size < MOST_BYTES
    code = {
        path.relative_to(ROOT).as_posix()
        for folder in CODE
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(code) > 150 and code | {"experiments/mine.yaml"} <= names
    command = [sys.executable, "jobs/pretrain.py", "--config", "experiments/mine.yaml", "--dry_run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "train_steps: 7" in told.stdout, told.stderr
