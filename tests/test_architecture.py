"""Imports point one way: model <- pipeline <- jobs, benchmarks, tests (docs/design.md, section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = set(sys.stdlib_module_names) | {"__future__"}
PIPELINE = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}

STORAGE = {"errors", "object_store", "storage"}
SHARDS = STORAGE | {"manifest", "shards", "locks", "shard_cache"}
REMOTE = {"errors", "object_store", "retries", "range_file", "globs", "hub", "web", "remote"}
SOURCES = REMOTE | {"pieces", "docstrings", "parquet_footers", "sources"}
READERS = SOURCES | {"json_lines", "segments", "readers", "plans"}

# What each pipeline module may not import of the pipeline, its own transitive imports included.
FORBIDDEN = {
    "errors": PIPELINE,
    "locks": PIPELINE - STORAGE,
    "parquet_footers": PIPELINE,
    "storage": PIPELINE - STORAGE,
    "shards": PIPELINE - SHARDS,
    "remote": PIPELINE - REMOTE,
    "sources": PIPELINE - SOURCES,
    "readers": PIPELINE - READERS,
    "plans": PIPELINE - READERS,
    "bpe": {name for name in PIPELINE if not name.startswith(("bpe", "unicode", "kernel", "errors"))},
    "bpe_training": {name for name in PIPELINE if not name.startswith(("bpe", "unicode", "kernel", "errors"))},
    "deduplication": PIPELINE,
    "config": PIPELINE - {"errors", "bpe_files"},
    "command_line": PIPELINE - {"errors"},
    "stage_progress": PIPELINE - REMOTE - {"pieces"},
    "batches": PIPELINE - SHARDS,
    "stopping": PIPELINE - {"errors"},
    "heartbeats": PIPELINE,
    "watchdog": PIPELINE - {"heartbeats"},
    "outcomes": PIPELINE - {"parallel", "errors"},
    "shard_checks": PIPELINE - SHARDS,
    "runs": {"trainer", "stages", "launch", "sources", "cluster", "bpe_training", "tokenizer_training"},
    "trainer": {"stages", "launch", "sources", "cluster", "bpe_training", "tokenizer_training"},
    "graph": {"launch", "trainer", "checkpoint", "batches", "parallel", "evaluation", "tokenizer_training"},
}
ONLY_IN = {
    "ray.data": {"graph"},
    "ray.train": {"launch", "worker_group"},
    "ray.serve": {"serving"},
    "ray.util.metrics": {"ray_metrics"},
    "mlflow": {"mlflow_run", "mlflow_sending", "pyfunc", "pyfunc_model"},
}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, type-checking blocks excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes(path: Path) -> set[str]:
    """Every dotted name that a file uses: ray.data is reached through ray."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def pipeline_imports(module: str) -> set[str]:
    names = {
        name.split(".")[1] for name in imported_modules(ROOT / f"pipeline/{module}.py") if name.startswith("pipeline.")
    }
    return names & PIPELINE


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_the_network_imports_torch_and_the_standard_library_only(path: Path) -> None:
    top_level = {name.split(".")[0] for name in imported_modules(path)}
    assert top_level <= STANDARD_LIBRARY | {"torch", "model"}


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_the_network_knows_nothing_of_clusters_and_files(path: Path) -> None:
    imported = imported_modules(path)
    assert not {name for name in imported if name.startswith(("torch.distributed", "pathlib", "io", "os"))}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "open" not in calls and "torch.load" not in calls and "torch.save" not in calls


@pytest.mark.parametrize("path", files("pipeline"), ids=lambda path: path.stem)
def test_the_pipeline_does_not_import_jobs_or_benchmarks(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] in {"jobs", "benchmarks", "tests"}}


@pytest.mark.parametrize("module", sorted(FORBIDDEN))
def test_pipeline_modules_import_one_way(module: str) -> None:
    reached, frontier = set(), {module}
    while frontier:
        frontier = set().union(*(pipeline_imports(name) for name in frontier)) - reached
        reached |= frontier
    assert not (reached - {module}) & FORBIDDEN[module]


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_each_framework_is_imported_where_it_belongs(library: str) -> None:
    users = {
        path.stem
        for path in files("pipeline")
        if any(f"{name}.".startswith(f"{library}.") for name in imported_modules(path) | attributes(path))
    }
    assert users == ONLY_IN[library]


def test_the_trainer_runs_where_ray_and_mlflow_are_not_installed() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'tyro', 'huggingface_hub', 'obstore'): sys.modules[name] = None\n"
        "import pipeline.training.trainer\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("folder", ["model", "pipeline", "jobs"])
def test_nothing_is_unpickled(folder: str) -> None:
    for path in files(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "cloudpickle.loads"}, path
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8"), path
