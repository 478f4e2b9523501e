"""To the hub and back, by the commands: the folder arrives whole, the token is never shown, mistakes are sentences."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_model_hub import TOKEN, FakeModelHub, running_model_hub
from tests.support.models import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub() -> Iterator[FakeModelHub]:
    with running_model_hub() as found:
        yield found


def job(name: str, *flags: str, hub: str, home: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GPT25_"))}
    # The fake has no Xet storage: files go by LFS, as they do where hf_xet is not installed.
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, str(ROOT / "jobs" / name), *flags]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def test_push_and_back(checkpoint: Path, hub: FakeModelHub, tmp_path: Path) -> None:
    flags = [str(checkpoint), "--output", "out", "--push_to_hub", "me/small"]
    result = job("export.py", *flags, hub=hub.url, home=tmp_path)
    assert result.returncode == 0, result.stderr
    commit = hub.branches["me/small"]
    assert f"hf://me/small@{commit}" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    pushed = hub.models["me/small"][commit]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: pushed[name] for name in local} == local
    assert b'from_pretrained("me/small")' in pushed["README.md"] and hub.messages == ["GPT-2.5, step 40"]
    generate = ["--max_new_tokens", "8", "--device", "cpu", "--checkpoint"]
    there = job("generate.py", *generate, str(checkpoint), hub=hub.url, home=tmp_path)
    hub.requests.clear()
    back = job("generate.py", *generate, "hf://me/small", hub=hub.url, home=tmp_path, token=None)
    assert back.returncode == 0, back.stderr
    assert back.stdout == there.stdout
    assert not any("README" in request for request in hub.requests), "only what is needed is fetched"
    pinned = job("generate.py", *generate, f"hf://me/small@{commit}", hub=hub.url, home=tmp_path, token=None)
    assert pinned.stdout == there.stdout


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("me/small", None, "set HF_TOKEN"),
        ("me", TOKEN, "it must be OWNER/NAME"),
        ("me/small", "hf_wrong", "the hub refuses it (401); is HF_TOKEN right"),
    ],
)
def test_a_push_that_cannot_be(
    checkpoint: Path, hub: FakeModelHub, tmp_path: Path, *, name: str, token: str | None, words: str
) -> None:
    flags = [str(checkpoint), "--output", "out", "--push_to_hub", name]
    result = job("export.py", *flags, hub=hub.url, home=tmp_path, token=token)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert "hf_wrong" not in result.stderr
    assert "me/small" not in hub.models


def test_models_that_are_not_there(hub: FakeModelHub, tmp_path: Path) -> None:
    hub.commit("me/small", {"README.md": b""})
    for address, words in (
        ("hf://me/absent", "the hub has no such name"),
        ("hf://me/small@v9", "the hub has no such revision"),
        ("hf://me", "not of the form hf://OWNER/NAME"),
        ("hf://me/small", "has no config.json"),
    ):
        result = job("generate.py", "--checkpoint", address, hub=hub.url, home=tmp_path, token=None)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    result = job("generate.py", "--checkpoint", "hf://me/small", hub="http://127.0.0.1:9", home=tmp_path)
    assert "cannot be reached" in result.stderr and "Traceback" not in result.stderr
