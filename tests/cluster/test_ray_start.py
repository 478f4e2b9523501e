"""A local Ray: whose packages its workers find, which signals reach it, where its sockets lie; errors that repeat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

from pipeline.cluster import ray_cluster
from pipeline.cluster.workers import GroupSettings, SharedFiles, run_workers
from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from tests.support.fixtures import ROOT
from tests.support.ray_environment import own_environment

QUESTIONS = f"""
import json, os, signal, sys
sys.path[0] = {str(ROOT)!r}
import psutil
from pipeline import exit_signals
from pipeline.cluster import ray_cluster

with exit_signals.watched("ended"):
    ours = signal.getsignal(signal.SIGTERM)
    ray_cluster.connect(num_cpus=1)
    import ray

    @ray.remote
    def found():
        import importlib.util
        names = ("my_hpc_package", "my_second_package", "pipeline")
        return os.environ["PYTHONPATH"], [importlib.util.find_spec(name) is not None for name in names]

    children = psutil.Process().children()
    print(json.dumps({{
        "workers": ray.get(found.remote()),
        "kept": signal.getsignal(signal.SIGTERM) == ours,
        "in our group": [child.name() for child in children if os.getpgid(child.pid) == os.getpgid(0)],
        "processes": len(children),
    }}))
"""


def test_workers_find_what_the_users_pythonpath_names_and_signals_reach_the_job_alone(tmp_path: Path) -> None:
    for folder, package in (("site", "my_hpc_package"), ("here/lib", "my_second_package")):
        (tmp_path / folder / package).mkdir(parents=True)
        (tmp_path / folder / package / "__init__.py").touch()
    (tmp_path / "questions.py").write_text(QUESTIONS)
    environment = own_environment() | {"PYTHONPATH": f"{tmp_path}/site{os.pathsep}lib{os.pathsep}"}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "questions.py")],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    path, found = answers["workers"]
    assert found == [True, True, True]
    assert path.split(os.pathsep) == [str(ROOT), f"{tmp_path}/site", f"{tmp_path}/here/lib"], (
        "no empty entry: it is '.'"
    )
    assert answers["kept"], "ray.init takes SIGTERM"
    assert answers["processes"] >= 3 and answers["in our group"] == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception("The current node timed out during startup. This could happen because\nsome of the raylet failed."),
         "The current node timed out during startup"),
        (Exception("Failed to read dashboard.err file: [Errno 2] no such file. Please report an issue to Ray github."),
         "its dashboard did not come up in time"),
        (RuntimeError("Failed to connect to GCS."), "Failed to connect to GCS"),
        (TimeoutError("Timed out while waiting for the file."), "Timed out while waiting for the file"),
    ],
)  # fmt: skip
def test_a_ray_that_does_not_come_up_is_one_sentence(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    before = dict(os.environ)
    with pytest.raises(UserError) as found:
        ray_cluster.connect(num_cpus=1)
    assert str(found.value).startswith(f"Ray did not start on this machine ({reason}); give the same command again")
    assert os.environ.get("PYTHONPATH") == before.get("PYTHONPATH")


def test_a_mistake_of_ours_in_the_start_of_ray_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: Any) -> None:
        raise KeyError("a setting")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(KeyError):
        ray_cluster.connect(num_cpus=1)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_deep_for_rays_sockets_is_one_sentence(tiny_data: Path, tmp_path: Path, variable: str) -> None:
    """As batch systems make them for every job."""
    deep = tmp_path / ("a_rather_long_scratch_folder_such_as_slurm_makes_for_every_job/user_1234567/job_7654321")
    deep.mkdir(parents=True)
    flags = ["--data", str(tiny_data), "--output", "run", "--num_workers=2", "--context_length=32"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "jobs/pretrain.py"), *flags],
        cwd=tmp_path,
        env=own_environment() | {variable: str(deep)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 1
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(
        f"error: Ray cannot start: its sockets in {deep} would have paths of more than 107 bytes"
    )
    assert "set RAY_TMPDIR to a folder with a short path" in sentence and "Traceback" not in result.stderr


def count_and_fail(settings: dict[str, Any], files: SharedFiles) -> None:
    """One rank has an error of the program, the others wait for it."""
    with Path(settings["starts"]).open("a") as starts:
        starts.write(f"{dist.get_rank()}\n")
    dist.barrier()  # a rank that begins after the error finds its file, and does not start at all
    if dist.get_rank() == settings["failing"]:
        raise {"value": ValueError("max_norm 0; needed: a positive max_norm"), "assert": AssertionError()}[
            settings["kind"]
        ]
    dist.all_reduce(torch.zeros(1))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("kind", "failing"), [("value", 0), ("assert", 1)])
def test_an_error_that_comes_again_costs_one_start(tmp_path: Path, kind: str, failing: int) -> None:
    (tmp_path / "files").mkdir()  # as the output folder of a run is made before its workers start
    settings = {"starts": str(tmp_path / "starts"), "kind": kind, "failing": failing}
    group = GroupSettings(num_workers=2, device="cpu", max_failures=3, stop_on_signals=True)
    words = {
        "value": "ValueError: max_norm 0; needed: a positive max_norm",
        "assert": "AssertionError: no further words",
    }
    with pytest.raises(
        UserError, match=rf"a worker cannot go on: {words[kind]} \(tests/cluster/test_ray_start\.py:\d+\)"
    ):
        run_workers(count_and_fail, settings, group, open_folder(tmp_path / "files"))
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1"]
    assert not list((tmp_path / "files").iterdir()), "no file of theirs is left"
