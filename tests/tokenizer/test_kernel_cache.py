"""Compiled kernels on disk: found again from another checkout, never run stale, nothing done at import."""

from __future__ import annotations

import ast
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.tokenizer.kernels import cache as kernel_cache
from pipeline.tokenizer.kernels import count as count_kernels
from pipeline.tokenizer.kernels import encode as encode_kernels
from pipeline.tokenizer.kernels import hash_table, merge_short
from pipeline.tokenizer.kernels import train as train_kernels
from pipeline.tokenizer.training import count_pretokens, merge_counts, train_bpe, warm_up

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("pipeline/tokenizer/kernels")
HELPER = """
from pipeline.tokenizer.kernels.cache import helper

@helper
def step(number):
    return number + 1
"""
KERNEL = """
from pipeline.tokenizer.kernels.cache import kernel
from pipeline.tokenizer.kernels.inner import step

@kernel
def twice(number):
    return step(step(number))
"""
CALL = """
from pipeline.tokenizer.kernels.outer import twice
print(twice(0), sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def run(code: str, folder: Path, cache: Path | str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "GPT25_KERNEL_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package pipeline with one kernel, whose helper is in another file."""
    folder = tmp_path / "checkout"
    (folder / KERNELS).mkdir(parents=True)
    for package in (KERNELS, *KERNELS.parents):
        (folder / package / "__init__.py").touch()
    shutil.copy(ROOT / KERNELS / "cache.py", folder / KERNELS)
    (folder / KERNELS / "inner.py").write_text(HELPER, encoding="utf-8")
    (folder / KERNELS / "outer.py").write_text(KERNEL, encoding="utf-8")
    return folder


def test_compiling_is_said_once_and_only_where_it_happens(checkout: Path, tmp_path: Path) -> None:
    (checkout / KERNELS / "second.py").write_text(KERNEL, encoding="utf-8")
    calls = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + CALL + CALL.replace("outer", "second")
    found = [run(calls, checkout, tmp_path / "cache").stderr.count("compiling kernels") for _ in range(2)]
    assert found == [1, 0]


def test_found_from_another_checkout_and_never_stale(checkout: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(CALL, checkout, cache).stdout.split() == ["2", "0", "1"]
    other = tmp_path / "elsewhere" / "unpacked"
    shutil.copytree(checkout, other, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (other / KERNELS).iterdir():
        os.utime(file, (1, 1))
    assert run(CALL, other, cache).stdout.split() == ["2", "1", "0"]
    # The edit is in the helper's file and keeps its size; numba's own stamp looks at the kernel's file.
    (checkout / KERNELS / "inner.py").write_text(HELPER.replace("+ 1", "+ 5"), encoding="utf-8")
    assert run(CALL, checkout, cache).stdout.split() == ["10", "0", "1"]
    assert len(list(cache.glob("numba-*"))) == 2


def test_processes_that_start_together_compile_once(checkout: Path, tmp_path: Path) -> None:
    slow = KERNEL.replace("step(step(number))", "step(step(number)) + sum(sorted(list(range(number))))")
    (checkout / KERNELS / "outer.py").write_text(slow, encoding="utf-8")
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(run, CALL, checkout, tmp_path / "cache") for _ in range(4)]
    assert sorted(each.result().stdout.split() for each in done) == [["2", "0", "1"], *[["2", "1", "0"]] * 3]


def test_a_folder_that_cannot_be_written_costs_a_warning(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(CALL, checkout, tmp_path / "file" / "cache")
    assert done.stdout.split()[0] == "2"
    assert "compiled kernels are not kept" in done.stderr


ATTACK = """
import pickle, sys
class Attack:
    def __reduce__(self):
        return open, (sys.argv[1], "w")
print(pickle.dumps(Attack()).hex())
"""


def poison(cache: Path, proof: Path) -> None:
    """Put pickles in the place of all that numba reads; each would make the file ``proof``."""
    done = subprocess.run([sys.executable, "-c", ATTACK, str(proof)], check=True, capture_output=True, text=True)
    content = bytes.fromhex(done.stdout)
    for path in [*cache.rglob("*.nbi"), *cache.rglob("*.nbc")]:
        path.write_bytes(content)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the processes of a test."""
    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
@pytest.mark.parametrize("place", ["", "numba-*"])
def test_a_cache_that_others_can_write_to_is_not_used(
    checkout: Path, tmp_path: Path, temporary: Path, mode: int, place: str
) -> None:
    cache = tmp_path / "cache"
    run(CALL, checkout, cache)
    poison(cache, tmp_path / "proof")
    (next(cache.glob(place)) if place else cache).chmod(mode)
    done = run(CALL, checkout, cache)
    assert not (tmp_path / "proof").exists()
    assert done.stdout.split() == ["2", "0", "1"] and "others can write to" in done.stderr
    assert run(CALL, checkout, cache).stdout.split() == ["2", "1", "0"]  # kept in a private folder
    (private,) = temporary.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_prepared_in_the_temporary_folder_is_not_used_either(
    checkout: Path, tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    prepared = temporary / f"gpt-2.5-kernels-{os.geteuid()}"
    prepared.mkdir()
    prepared.chmod(0o777)
    assert run(CALL, checkout, tmp_path / "cache").stdout.split() == ["2", "0", "1"]
    assert list(prepared.iterdir()) == [] and len(list(temporary.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which root alone can")
@pytest.mark.parametrize("place", ["", "numba-*", "numba-*/*.nbc"])
def test_what_belongs_to_another_user_is_not_used(checkout: Path, tmp_path: Path, temporary: Path, place: str) -> None:
    cache = tmp_path / "cache"
    run(CALL, checkout, cache)
    poison(cache, tmp_path / "proof")
    os.chown(next(cache.glob(place)) if place else cache, 12345, 12345)
    assert run(CALL, checkout, cache).stdout.split() == ["2", "0", "1"]
    assert not (tmp_path / "proof").exists()


def test_import_compiles_and_makes_nothing(tmp_path: Path) -> None:
    code = """
import pipeline.tokenizer.training as training, pipeline.tokenizer.kernels.encode as kernels
print(len(kernels.encode_documents.signatures), len(training.kernels.learn.signatures))
"""
    assert run(code, ROOT, tmp_path / "cache").stdout.split() == ["0", "0"]
    assert not (tmp_path / "cache").exists()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT25_KERNEL_CACHE", str(tmp_path / "named"))
    assert kernel_cache.cache_root() == tmp_path / "named"
    monkeypatch.delenv("GPT25_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache.cache_root() == tmp_path / "xdg" / "gpt-2.5"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kernel_cache.cache_root() == tmp_path / "home" / ".cache" / "gpt-2.5"


def test_the_stamp_knows_the_machine() -> None:
    assert kernel_cache.stamp("one") != kernel_cache.stamp("other") and kernel_cache.stamp("one") == kernel_cache.stamp(
        "one"
    )


def imports_numba(path: Path) -> bool:
    """Whether a file imports numba, or the decorators that make kernels of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return kernel_cache.__name__ in names or any(name.split(".")[0] == "numba" for name in names)


def stamp_of(checkout: Path) -> str:
    """The stamp that the sources in another folder give."""
    path = checkout / Path(kernel_cache.__file__).relative_to(ROOT)
    spec = importlib.util.spec_from_file_location("another_kernel_cache", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.stamp("a machine"))


def test_the_stamp_covers_every_source_of_kernels(tmp_path: Path) -> None:
    sources = {path.relative_to(ROOT) for path in kernel_cache.kernel_sources()}
    found = {path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py") if imports_numba(path)}
    assert len(found) >= 10 and found <= sources
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    stamps = {stamp_of(tmp_path)}
    for number, source in enumerate(sorted(sources), 2):
        with (tmp_path / source).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        stamps.add(stamp_of(tmp_path))
        assert len(stamps) == number, source


def test_a_kernel_has_one_signature_and_warming_up_compiles_it() -> None:
    modules = [encode_kernels, merge_short, hash_table, count_kernels, train_kernels]
    found = {name: value for module in modules for name, value in vars(module).items() if hasattr(value, "_cache")}
    kernels = {name: value for name, value in found.items() if isinstance(value._cache, kernel_cache.StampedCache)}
    warm_up()
    assert len(kernels) == 10
    del kernels["pretokenize"]  # for looking at pretokens; no job needs it
    assert {name: len(value.signatures) for name, value in kernels.items()} == dict.fromkeys(kernels, 1)
    counts = merge_counts([count_pretokens(pa.array(["a b", "c" * 500]))] * 2)
    train_bpe(counts, 260).encode_batch(["ab", "c" * 600, "d" * 200])
    pickle.loads(pickle.dumps(train_bpe(counts, 260))).encode_bytes(b"\xff\xfe" * 200)
    count_pretokens([" ".join(map(str, range(40_000)))])  # the table grows
    assert {name: len(value.signatures) for name, value in kernels.items()} == dict.fromkeys(kernels, 1)
