"""Fixtures that several folders of tests share; tests/conftest.py hands them on."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.mlflow_server import serve

ROOT = Path(__file__).resolve().parents[2]
ALPHABET = "etaoinshrdlu"


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of an MLflow server of this test alone."""
    with serve(f"sqlite:///{tmp_path / 'server.db'}", tmp_path / "artifacts") as server:
        yield server


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs; for ``pytest.mark.usefixtures``."""
    import ray

    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        variables = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hub")}
        ray.shutdown()  # a job of an earlier test may have left its own Ray
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    choose = random.Random(7)
    words = ["".join(choose.choices(ALPHABET, k=choose.randrange(1, 9))) for _ in range(60)]
    texts = [" ".join(choose.choices(words, k=choose.randrange(1, 60))) for _ in range(400)]
    return [*texts, "żółw ½ 日本語 🙂", "<|endoftext|> is no token here", texts[0], texts[1]]


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    """Three files, five work items of 12,000 bytes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, part in [("a.parquet", documents[:160]), ("b.parquet", documents[160:320])]:
        pq.write_table(pa.table({"text": part}), folder / name, row_group_size=80, write_statistics=False)
    lines = [json.dumps({"text": text}) for text in documents[320:]]
    (folder / "c.jsonl").write_text("\n".join([*lines, '{"text": null}', '{"text": " "}', ""]))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file -> hash of its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
