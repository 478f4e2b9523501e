"""The wheel holds every module and every other file of the packages, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "pipeline", "jobs")


def package_files() -> set[str]:
    """What lies in the packages' folders, compiled Python excepted."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel, built by setuptools in a copy of the project without any network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "project"
    for name in (*PACKAGES, "tests", "benchmarks", "deploy", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "old_files"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_it_holds_the_packages_whole(wheel: set[str]) -> None:
    expected = package_files()
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    assert any(name.endswith("page.html") for name in expected)


def test_every_folder_with_modules_is_a_package(wheel: set[str]) -> None:
    folders = {name.rpartition("/")[0] for name in package_files() if name.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= wheel


def test_it_holds_the_sources_of_the_kernels(wheel: set[str]) -> None:
    from pipeline.tokenizer.kernels.cache import kernel_sources

    assert {path.relative_to(ROOT).as_posix() for path in kernel_sources()} <= wheel
