"""Imports point one way: model <- pipeline <- jobs, benchmarks, tests; inside pipeline/ by the table below.

The table is docs/design.md, section 2, made to hold: it names for every room (folder of pipeline/, or file directly in
it) the rooms that it may import, type-checking imports included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = set(sys.stdlib_module_names) | {"__future__"}
MOST_FILES = 14

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "exit_signals": set(),
    "versions": set(),
    "console": {"redaction"},
    "run_files": set(),
    "published_results": set(),
    "redaction": set(),
    "storage": {"errors"},
    "log_files": {"errors", "redaction", "console", "storage"},
    "tokenizer": {"errors", "storage"},
    "paths": {"errors", "storage"},
    "config": {"errors", "paths", "redaction", "tokenizer.patterns"},
    "distributed": {"errors", "exit_signals"},
    "listing": {"errors"},
    "remote": {"errors", "redaction", "storage", "listing"},
    "sources": {"errors", "paths", "listing", "remote"},
    "filters": {"errors", "tokenizer.kernels.cache"},
    "deduplication": {"sources.arrow_values", "tokenizer"},
    "decontamination": {
        *("errors", "storage", "paths", "config", "remote", "sources", "deduplication", "tokenizer", "tasks"),
    },
    "dataset": {"errors", "storage", "tokenizer"},
    "checkpoints": {"errors", "storage", "distributed", "versions"},
    "tracking": {
        *("errors", "storage", "paths", "redaction", "console", "run_files", "versions", "distributed"),
        "published_results",
    },
    "tasks": {"errors", "storage", "paths", "config", "console", "remote", "distributed", "tokenizer", "dataset"},
    "cluster": {"errors", "exit_signals", "storage", "paths", "config", "console", "log_files", "distributed"},
}
ROOMS["gguf_export"] = {"errors", "tokenizer", "conversations.templates"}
ROOMS["pretrained"] = {
    *("errors", "storage", "paths", "redaction", "tokenizer", "checkpoints", "tracking", "run_files"),
    *("remote.hub_client", "conversations.templates"),
}
ROOMS["generation"] = {
    *("errors", "paths", "config", "tokenizer", "distributed", "pretrained", "conversations.templates"),
}
ROOMS["preprocessing"] = {
    *("errors", "storage", "paths", "config", "console", "run_files", "listing", "sources", "remote", "tokenizer"),
    *("filters", "deduplication", "decontamination", "dataset", "tracking", "cluster"),
}
ROOMS["estimation"] = {
    *("errors", "storage", "paths", "config", "console", "sources", "remote", "tokenizer", "filters", "deduplication"),
    *("decontamination", "dataset", "preprocessing"),
}
ROOMS["conversations"] = {
    *("errors", "storage", "paths", "config", "run_files", "sources", "tokenizer", "dataset", "tracking"),
    "preprocessing",
}
ROOMS["serving"] = {
    *("errors", "exit_signals", "paths", "config", "tokenizer", "distributed", "cluster", "pretrained", "generation"),
    "conversations.templates",
}
_DATA = {"listing", "sources", "remote", "filters", "deduplication", "decontamination", "preprocessing", "estimation"}
ROOMS["evaluation"] = set(ROOMS) - _DATA - {"serving"}
ROOMS["training"] = set(ROOMS) - _DATA - {"serving"}
ROOMS["sweep"] = {
    *("errors", "storage", "paths", "config", "run_files", "distributed", "tracking", "cluster", "training"),
}
ROOMS["demo"] = {"config", "paths", "storage", "dataset"}

MORE_FOR: dict[str, set[str]] = {
    "conversations.finetune_job": {"pretrained", "training"},
    "pretrained.export_job": {"config", "dataset", "generation", "gguf_export"},
    "pretrained.model_card": {"config", "dataset", "generation"},
    "pretrained.pyfunc": {"generation"},
}
"""Single files that may import more rooms than their own room."""
LESS_FOR: dict[str, set[str]] = {
    "conversations.templates": ROOMS["conversations"] - {"tokenizer"},
    "tokenizer.patterns": {"tokenizer"},
    "training.trainer": {"cluster"},
}
"""Single files that may not import these, though their room may."""

ONLY_IN = {
    "ray.data": {"preprocessing.ray_dataflow"},
    "ray.train": {"training.launch", "cluster.workers", "cluster.worker_group"},
    "ray.tune": {"sweep.early_stopping", "sweep.trainable", "sweep.tuning"},
    "ray.serve": {"serving.serve_job"},
    "ray.util.metrics": {"tracking.ray_metrics"},
    "mlflow": {
        *("tracking.mlflow_run", "tracking.mlflow_writer", "pretrained.mlflow_registry", "pretrained.pyfunc"),
        *("pretrained.pyfunc_model", "tracking.system_metrics"),
    },
}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, and every name that it imports from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def attributes(path: Path) -> set[str]:
    """Every dotted name that a file uses: ray.data is reached through ray."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    """tracking.report for pipeline/tracking/report.py."""
    return ".".join(path.relative_to(ROOT / "pipeline").with_suffix("").parts)


@cache
def pipeline_modules() -> dict[str, Path]:
    return {module_name(path): path for path in files("pipeline")}


def pipeline_imports(path: Path) -> set[str]:
    """The modules of pipeline/ that a file imports, without the leading ``pipeline.``."""
    names = {name.removeprefix("pipeline.") for name in imported_modules(path) if name.startswith("pipeline.")}
    return names & pipeline_modules().keys()


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_files_are_found() -> None:
    assert len(pipeline_modules()) > 90 and {"errors", "training.trainer"} <= pipeline_modules().keys()


def test_every_file_stands_in_a_room_of_the_table() -> None:
    assert {room_of(module) for module in pipeline_modules()} == ROOMS.keys()


def test_no_room_is_crowded() -> None:
    folders = {path.parent for path in files("pipeline")}
    crowded = {str(folder): count for folder in folders if (count := len(list(folder.glob("[!_]*.py")))) > MOST_FILES}
    assert not crowded


def test_the_table_has_no_circle() -> None:
    left = {room: {room_of(name) for name in allowed} - {room} for room, allowed in ROOMS.items()}
    while ready := [room for room, allowed in left.items() if not allowed & left.keys()]:
        for room in ready:
            del left[room]
    assert not left


@pytest.mark.parametrize("module", sorted(pipeline_modules()))
def test_a_file_imports_only_what_the_table_allows(module: str) -> None:
    allowed = (ROOMS[room_of(module)] | {room_of(module)} | MORE_FOR.get(module, set())) - LESS_FOR.get(module, set())
    extra = {
        name
        for name in pipeline_imports(pipeline_modules()[module])
        if name not in allowed and room_of(name) not in allowed
    }
    assert not extra


def test_files_import_each_other_in_no_circle() -> None:
    left = {module: pipeline_imports(path) for module, path in pipeline_modules().items()}
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        for module in ready:
            del left[module]
    assert not left


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_the_network_imports_torch_and_the_standard_library_only(path: Path) -> None:
    top_level = {name.split(".")[0] for name in imported_modules(path)}
    # The kernel for GPUs is the one exception, and imported by nothing when a module is loaded.
    assert top_level <= STANDARD_LIBRARY | {"torch", "model"} | ({"triton"} if path.stem == "loss_kernel" else set())


def test_the_network_is_imported_without_triton() -> None:
    names = [f"model.{path.stem}" for path in files("model") if path.stem not in {"__init__", "loss_kernel"}]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "assert 'model.loss_kernel' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=1200)


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_the_network_knows_nothing_of_clusters_and_files(path: Path) -> None:
    imported = imported_modules(path)
    assert not {name for name in imported if name.startswith(("torch.distributed", "pathlib", "io", "os"))}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "open" not in calls and "torch.load" not in calls and "torch.save" not in calls


@pytest.mark.parametrize("path", files("pipeline"), ids=module_name)
def test_the_pipeline_does_not_import_jobs_or_benchmarks(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] in {"jobs", "benchmarks", "tests"}}


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_each_framework_is_imported_where_it_belongs(library: str) -> None:
    users = {
        module
        for module, path in pipeline_modules().items()
        if any(f"{name}.".startswith(f"{library}.") for name in imported_modules(path) | attributes(path))
    }
    assert users == ONLY_IN[library]


def test_the_trainer_runs_where_ray_and_mlflow_are_not_installed() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'tyro', 'huggingface_hub', 'obstore'): sys.modules[name] = None\n"
        "import pipeline.training.trainer\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=1200)


@pytest.mark.parametrize("folder", ["model", "pipeline", "jobs"])
def test_nothing_is_unpickled(folder: str) -> None:
    for path in files(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "cloudpickle.loads"}, path
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8"), path


# --- files that prose names -------------------------------------------------------------------------------------------

NAMED_FILE = re.compile(r"(?<![\w/.*<-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|yaml|html|md))\b")
OTHERS_FILES = {  # of other projects, of other machines, or made by a user
    *("pretrain.yaml", "jobs/NAME.py", "report.html", "core.yaml"),
    *("convert_hf_to_gguf.py", "examples/tokenize_from_hf_to_s3.py", "scripts/base_train.py"),
    *("FOLDER/forward_0.py", "forward_0.py", "backward_1.py", "data/shakespeare/prepare.py"),
}


def prose() -> list[Path]:
    code = [path for folder in ("model", "pipeline", "jobs", "benchmarks", "tests", "tools") for path in files(folder)]
    return [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), *code]


def docstrings_of(path: Path) -> str:
    """All strings that stand as statements in a file: docstrings of modules, classes, functions and fields."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return "\n".join(
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


@cache
def known_files() -> set[str]:
    """Every path of the project and every end of one: trainer.py, training/trainer.py, pipeline/training/trainer.py."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return {"/".join(path.parts[start:]) for path in paths for start in range(len(path.parts))}


@pytest.mark.parametrize("path", prose(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_prose_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else docstrings_of(path)
    missing = {name for name in NAMED_FILE.findall(text) if name not in known_files() | OTHERS_FILES}
    assert not missing
