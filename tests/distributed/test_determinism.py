"""--deterministic: what NCCL and cuBLAS are told, what the user's own settings break, and which passes it covers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.distributed.determinism import deterministic, nondeterministic_settings, set_environment
from pipeline.training import nonfinite, trainer
from tests.training.test_trainer import CONFIG, train_here

PREPARED = {
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def test_what_the_user_has_not_set_is_set() -> None:
    environment: dict[str, str] = {}
    set_environment(environment)
    assert environment == PREPARED
    assert not nondeterministic_settings(environment)


@pytest.mark.parametrize(("name", "value"), [("NCCL_ALGO", "Tree"), ("NCCL_ALGO", "ring"), ("NCCL_PROTO", "LL128")])
def test_what_repeats_as_well_stays_without_a_word(name: str, value: str) -> None:
    environment = {name: value}
    set_environment(environment)
    assert environment == {**PREPARED, name: value}
    assert not nondeterministic_settings(environment)


@pytest.mark.parametrize(
    ("name", "value"), [("NCCL_NVLS_ENABLE", "1"), ("NCCL_ALGO", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")]
)
def test_what_breaks_the_promise_stays_and_is_said(name: str, value: str) -> None:
    environment = {name: value}
    set_environment(environment)
    assert environment[name] == value
    (sentence,) = nondeterministic_settings(environment)
    assert sentence.startswith(f"{name} is set to {value}, so a resumed run may differ in its last bits")
    assert sentence.endswith(f"unset it, or set it to {PREPARED[name]}, or give --deterministic off")


@pytest.mark.parametrize("enabled", [True, False])
def test_on_a_gpu_the_mode_is_on_inside_and_off_again_outside(enabled: bool) -> None:
    """Setting the mode needs no GPU."""
    with deterministic(torch.device("cuda"), enabled=enabled):
        assert torch.are_deterministic_algorithms_enabled() is enabled
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("deterministic", "enabled"), [("on", True), ("off", False)])
def test_the_setting_reaches_every_step_and_is_recorded(
    deterministic: str, enabled: bool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    @contextlib.contextmanager
    def recording(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
        asked.append(enabled)
        yield

    for module in (trainer, nonfinite):
        monkeypatch.setattr(module, "deterministic", recording)
    config = dataclasses.replace(CONFIG, deterministic=deterministic)  # type: ignore[arg-type]  # mypy takes a str
    _, tracker = train_here(config, tiny_data, tmp_path)
    assert asked == [enabled] * CONFIG.train_steps
    assert tracker.params["deterministic"] == deterministic
