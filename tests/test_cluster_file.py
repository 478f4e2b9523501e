"""cluster.yaml passes Ray's own validation and offers what the recipe asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.command_line import resolve
from pipeline.config import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_one_node_carries_the_workers_of_the_recipe(cluster: dict[str, Any]) -> None:
    recipe = resolve(PretrainConfig, "pretrain", ["--config", str(ROOT / "configs/gpt2.5.yaml")], program="pretrain")
    resources = cluster["available_node_types"]["train"]["resources"]
    assert recipe.device == "cuda"
    assert resources["GPU"] == recipe.num_workers
    assert resources["CPU"] >= recipe.num_workers


def test_it_costs_nothing_while_idle(cluster: dict[str, Any]) -> None:
    workers = {
        name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]
    }
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert cluster["idle_timeout_minutes"] <= 15
    assert sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]


def test_the_dashboard_listens_on_loopback_and_tokens_are_on(cluster: dict[str, Any]) -> None:
    commands = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands and "--autoscaling-config=" in commands
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["setup_commands"])
    assert "~/.ray/auth_token" in cluster["file_mounts"]
