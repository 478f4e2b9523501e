"""Dockerfile and .dockerignore: what the image would hold, read line by line, as there is no builder on these machines.

What docker would send to a builder is decided by the docker package's own reading of .dockerignore. A copy of the files
that the image holds, and no others, runs the jobs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from docker.utils.build import exclude_paths
from packaging.specifiers import SpecifierSet

from tests.jobs.test_package import MADE

ROOT = Path(__file__).resolve().parent.parent
HOME = "/gpt-2.5"
OLDEST_DRIVER = {"13.0": 580}
"""NVIDIA's own figure: CUDA -> the driver that it needs."""
PYTHON_OF = {"24.04": "3.12"}
"""Ubuntu -> its python3."""


def read_instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


INSTRUCTIONS = read_instructions()
LOCKED = dict(re.findall(r"^([\w.\-]+)==([\w.]+)", (ROOT / "deploy/requirements.lock").read_text(), re.MULTILINE))
CLUSTER = (ROOT / "cluster.yaml").read_text()


def of(name: str) -> list[str]:
    return [rest for found, rest in INSTRUCTIONS if found == name]


def copied() -> dict[str, str]:
    """Name in the project -> its place in the image."""
    found = {}
    for rest in of("COPY"):
        *sources, target = rest.split()
        for source in sources:
            found[source] = target + source if target.endswith("/") else target
    return found


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(of("ENV"))))


def listed() -> set[str]:
    """The files of the project that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


def in_image() -> set[str]:
    return {name for name in listed() if any(name == it or name.startswith(f"{it}/") for it in copied())}


def test_only_known_instructions_are_there() -> None:
    """ADD fetches from anywhere; a VOLUME or an ENTRYPOINT would stand in KubeRay's way."""
    assert {name for name, _ in INSTRUCTIONS} == {"FROM", "RUN", "COPY", "ARG", "ENV", "USER", "WORKDIR", "CMD"}


def test_the_base_is_that_of_the_lock_and_of_the_nodes() -> None:
    (base,) = of("FROM")
    found = re.fullmatch(r"nvidia/cuda:((\d+\.\d+)\.\d+)-base-ubuntu(\d\d\.\d\d)", base)
    assert found is not None
    version, release, ubuntu = found.groups()
    assert LOCKED["cuda-toolkit"].startswith(f"{version}.")
    images = re.findall(r"sourceImage: (\S+)", CLUSTER)
    assert len(images) == 3 and all(f"ubuntu-{ubuntu.replace('.', '')}" in image for image in images)
    (driver,) = re.findall(r"-nvidia-(\d+)$", CLUSTER, re.MULTILINE)
    assert int(driver) >= OLDEST_DRIVER[release]
    python = PYTHON_OF[ubuntu]
    assert f"# Python {python}" in CLUSTER and f"# Python {python}." in (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")


def test_packages_are_those_of_the_lock_by_hash() -> None:
    pip = [rest for rest in of("RUN") if "pip install" in rest]
    assert len(pip) == 1 and pip[0].count("pip install") == 1
    assert f"--only-binary :all: --require-hashes --requirement {HOME}/deploy/requirements.lock" in pip[0]
    assert copied()["deploy/requirements.lock"] == f"{HOME}/deploy/requirements.lock"
    first, second, *_ = [number for number, (name, _) in enumerate(INSTRUCTIONS) if name == "COPY"]
    assert first < INSTRUCTIONS.index(("RUN", pip[0])) < second, "new code does not have the packages installed anew"
    assert not re.search(r"curl|wget \S+:|git clone|https?://|npm|conda", " ".join(of("RUN")))


def test_debian_packages_leave_no_lists_behind() -> None:
    (apt,) = [rest for rest in of("RUN") if "apt-get" in rest]
    assert "--no-install-recommends" in apt and apt.endswith("rm -rf /var/lib/apt/lists/*")
    in_nodes = re.findall(r"apt-get .*install -y -qq (.+)", CLUSTER)
    assert in_nodes and set(in_nodes[0].split()) <= set(apt.split())


def test_what_it_copies_is_there_and_may_be_read_by_the_builder() -> None:
    sent = exclude_paths(str(ROOT), ignored_patterns(), dockerfile="Dockerfile")
    for source, place in copied().items():
        assert (ROOT / source).exists() and source in sent, source
        assert place == f"{HOME}/{source}", "a file stands in the image where it stands in the project"


def ignored_patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_nothing_that_jobs_make_and_no_secret_gets_to_the_builder(tmp_path: Path) -> None:
    """A checkout in which jobs have run, with files of secrets in the places where people put them."""
    secret = (".env", "deploy/.env", "configs/.gpt-2.5.env", ".git/config", ".ray/auth_token", "jobs/.netrc")
    made = (*MADE, *secret, "jobs/__pycache__/serve.cpython-312.pyc", "notes.md", "model.gguf", "my.py")
    for name in (*listed(), *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sent = exclude_paths(str(tmp_path), ignored_patterns(), dockerfile="Dockerfile")
    files = {name for name in sent if (tmp_path / name).is_file()}
    assert files - {"Dockerfile", ".dockerignore"} == in_image()
    assert not files & set(made) - {"Dockerfile"}


def test_no_secret_is_built_in_and_the_user_is_nobody_special() -> None:
    names = {*environment(), *(rest.partition("=")[0] for rest in of("ARG"))}
    assert names == {
        *("COMMIT", "GPT25_COMMIT", "PATH", "PYTHONPATH", "RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY"),
    }
    (user,) = of("USER")
    (added,) = [rest for rest in of("RUN") if "useradd" in rest]
    number = re.search(r"--uid (\d+)", added)
    assert added.endswith(f" {user}") and number is not None and int(number[1]) > 1000
    after = INSTRUCTIONS[INSTRUCTIONS.index(("USER", user)) :]
    assert {name for name, _ in after} == {"USER", "WORKDIR", "CMD"}, "all that is written before belongs to root"
    assert "sudo" not in " ".join(rest for _, rest in INSTRUCTIONS)


def test_its_environment_is_that_of_the_nodes() -> None:
    node = dict(re.findall(r"^export (\w+)=(\w+)$", (ROOT / "deploy/node.sh").read_text(), re.MULTILINE))
    found = environment()
    for name in ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY"):
        assert found[name] == node[name]
    assert found["PYTHONPATH"] == HOME and found["PATH"] == f"{HOME}/.venv/bin:$PATH"


def test_the_manifest_of_kubernetes_fits_it() -> None:
    guide = (ROOT / "docs/cluster.md").read_text()
    text = guide.split("    kubectl apply -f pretrain.yaml\n")[1].split("\nIts fields were compared")[0]
    manifest = yaml.safe_load(re.sub(r"^    ", "", text, flags=re.MULTILINE))
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == LOCKED["ray"]
    places = [word for word in manifest["spec"]["entrypoint"].split() if word.startswith("/")]
    assert len(places) == 2 and all(place.removeprefix(f"{HOME}/") in in_image() for place in places)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the image, and no others."""
    folder = tmp_path_factory.mktemp("image") / "gpt-2.5"
    for name in in_image():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_its_files_are_enough_for_the_jobs(image: Path, tmp_path: Path) -> None:
    (command,) = of("CMD")
    program, job, *flags = json.loads(command)
    assert program == "python" and flags == ["/model"]
    for name, arguments, words in (
        (job.removeprefix(f"{HOME}/"), [*flags, "--dry_run"], "checkpoint: /model"),
        ("jobs/pretrain.py", ["--config", str(image / "configs/gpt2.5.yaml"), "--dry_run"], "d_model: 768"),
    ):
        done = subprocess.run(
            [sys.executable, str(image / name), *arguments],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(image), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == 0 and words in done.stdout, done.stderr
