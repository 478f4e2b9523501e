"""The cluster files: Ray and Google accept them, they offer what the recipe asks for, and open nothing to the world.

tests/cluster runs the second one for real; the first one needs an account.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs

from pipeline.config.command_line import resolve
from pipeline.config.data import TokenizeConfig
from pipeline.config.training import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = ("cluster.yaml", "cluster.onprem.yaml")
MACHINES = {  # Google's own figures
    "n2-highmem-4": {"CPU": 4},
    "n2-standard-16": {"CPU": 16},
    "a3-highgpu-4g": {"CPU": 104, "GPU": 4},
}


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


@pytest.fixture(scope="module")
def cloud() -> dict[str, Any]:
    return load("cluster.yaml")


def worker_types(config: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_explained(name: str) -> None:
    """A comment stands above each top-level key and each key of provider, auth and the node types, or behind it."""
    lines = (ROOT / name).read_text().splitlines()
    for number, line in enumerate(lines):
        if (
            re.match(r"[a-z_]+:", line)
            and number
            and line.rstrip() not in ("provider:", "auth:", "available_node_types:")
        ):
            block = lines[max(0, number - 2) : number]
            assert any(before.startswith("#") for before in block) or line.startswith("head_node_type"), line


# ---- what the jobs ask for, and what the nodes offer -----------------------------------------------------------------


def nodes_for(config: dict[str, Any], bundles: list[dict[str, float]]) -> dict[str, int]:
    """The nodes that Ray's autoscaler adds for ``bundles``, beside a head that runs: its own decision."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    settings = AutoscalingConfig(prepare_config(config), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=settings.get_node_type_configs(),
        max_num_nodes=settings.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in bundles]),
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


def test_training_gets_the_node_with_four_gpus(cloud: dict[str, Any]) -> None:
    from ray.train import ScalingConfig

    recipe = resolve(PretrainConfig, "pretrain", ["--config", str(ROOT / "configs/gpt2.5.yaml")], program="pretrain")
    assert recipe.device == "cuda" and isinstance(recipe.num_workers, int)
    asked = ScalingConfig(num_workers=recipe.num_workers, use_gpu=True)._resources_per_worker_not_none
    assert asked["GPU"] == 1
    assert nodes_for(cloud, [asked] * recipe.num_workers) == {"train": 1}
    assert cloud["available_node_types"]["train"]["resources"]["GPU"] == recipe.num_workers  # none lies idle


def test_tokenization_gets_all_cpu_nodes_and_no_gpu(cloud: dict[str, Any]) -> None:
    recipe = resolve(TokenizeConfig, "tokenize", ["--config", str(ROOT / "configs/gpt2.5.yaml")], program="tokenize")
    assert recipe.num_workers is None  # as many tasks as the cluster can have CPUs
    (most,) = re.findall(r"GPT25_MAX_CPUS=(\d+)", "\n".join(cloud["setup_commands"]))
    tokenize = cloud["available_node_types"]["tokenize"]
    assert int(most) == tokenize["max_workers"] * tokenize["resources"]["CPU"]
    assert nodes_for(cloud, [{"CPU": 1}] * int(most)) == {"tokenize": tokenize["max_workers"]}
    assert nodes_for(cloud, [{"CPU": 1}]) == {"tokenize": 1}


def test_one_cpu_is_what_a_tokenization_task_asks_for() -> None:
    """nodes_for assumes it: preprocessing/ray_dataflow.py sets num_cpus for downloads only; Ray's default is 1."""
    text = (ROOT / "pipeline/preprocessing/ray_dataflow.py").read_text()
    assert re.findall(r"num_cpus=(\S+?),", text) == ["0"]


def test_resources_are_those_of_the_machines(cloud: dict[str, Any]) -> None:
    for name, kind in worker_types(cloud).items():
        assert kind["resources"] == MACHINES[kind["node_config"]["machineType"]], name
    assert cloud["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_it_costs_nothing_while_idle(cloud: dict[str, Any]) -> None:
    workers = worker_types(cloud)
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert cloud["idle_timeout_minutes"] <= 15
    assert sum(kind["max_workers"] for kind in workers.values()) == cloud["max_workers"]
    assert all(kind["node_config"]["scheduling"]["provisioningModel"] == "SPOT" for kind in workers.values())


# ---- what Ray's schema does not look at ------------------------------------------------------------------------------


def fits(value: Any, schema: dict[str, Any], schemas: dict[str, Any], place: str) -> None:
    """Assert that ``value`` is what a Google discovery document describes: names, types, enumerations."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"]]
    kind = schema["type"]
    if kind == "object" and "properties" in schema:
        assert isinstance(value, dict), place
        for name, inner in value.items():
            assert name in schema["properties"], f"{place}.{name} is no field of the API"
            fits(inner, schema["properties"][name], schemas, f"{place}.{name}")
    elif kind == "array":
        assert isinstance(value, list), place
        for item in value:
            fits(item, schema["items"], schemas, f"{place}[]")
    else:
        types: dict[str, tuple[type, ...]] = {"string": (str, int), "boolean": (bool,), "integer": (int,)}
        wanted = (types | {"object": (dict,), "number": (int, float)})[kind]
        assert isinstance(value, wanted), place
        assert value in schema.get("enum", [value]), f"{place}: {value}"


def test_google_knows_every_field_of_the_machines(cloud: dict[str, Any]) -> None:
    discovery = pytest.importorskip("googleapiclient.discovery_cache")
    documents = Path(discovery.__file__).parent / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    for name, kind in cloud["available_node_types"].items():
        fits(kind["node_config"], {"$ref": "Instance"}, schemas, name)
    with pytest.raises(AssertionError, match="no field"):
        fits({"machinetype": "n2-standard-4"}, {"$ref": "Instance"}, schemas, "typo")


def test_what_to_fill_in_is_marked(cloud: dict[str, Any]) -> None:
    assert cloud["provider"]["project_id"] == "YOUR-PROJECT" and cloud["provider"]["region"] == "us-central1"
    assert cloud["provider"]["availability_zone"].startswith(cloud["provider"]["region"])
    text = (ROOT / "cluster.yaml").read_text()
    assert "YOUR-PROJECT stands in two places" in text
    assert len(re.findall(r"^[^#]*YOUR-PROJECT", text, flags=re.MULTILINE)) == 2


def test_workers_may_use_the_bucket_and_nothing_else(cloud: dict[str, Any]) -> None:
    """Ray gives its own account, which may rent machines, to the head only; its workers get none unless it is named."""
    guide = re.sub(r"\\\s+", "", (ROOT / "docs/cluster.md").read_text())
    for kind in worker_types(cloud).values():
        (account,) = kind["node_config"]["serviceAccounts"]
        name, _, place = account["email"].partition("@")
        assert place == "YOUR-PROJECT.iam.gserviceaccount.com" and "autoscaler" not in name
        assert account["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]
        assert f"gcloud iam service-accounts create {name}" in guide
        assert f"--role roles/storage.objectUser --member serviceAccount:{name}@{place}" in guide
    assert "serviceAccounts" not in cloud["available_node_types"]["head"]["node_config"]


@pytest.mark.parametrize("name", FILES)
def test_nodes_get_exactly_the_locked_packages(name: str) -> None:
    commands = "\n".join(load(name)["setup_commands"])
    assert "--only-binary :all: --require-hashes --requirement ~/gpt-2.5-node/deploy/requirements.lock" in commands
    assert commands.count("pip install") == 1
    assert load(name)["file_mounts"]["~/gpt-2.5-node/deploy"] == "deploy"


@pytest.mark.parametrize("name", FILES)
def test_nothing_listens_for_the_world_and_tokens_are_on(name: str) -> None:
    config = load(name)
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--node-ip-address=$NODE_IP" in head and "--node-ip-address=$NODE_IP" in worker
    assert "0.0.0.0" not in (ROOT / name).read_text()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in (ROOT / "deploy/node.sh").read_text()
    assert any("deploy/node.sh" in command and ".bashrc" in command for command in config["setup_commands"])


def test_both_files_start_nodes_alike() -> None:
    cloud, onprem = (load(name) for name in FILES)
    stop, firewall, start, leave = onprem["worker_start_ray_commands"]
    assert cloud["worker_start_ray_commands"] == [stop, start]
    assert "leave.sh" in leave  # machines that nobody deletes
    assert "firewall.sh" in firewall


def test_the_firewall_is_set_before_each_start_of_ray() -> None:
    """Ray gives the setup commands again only for a changed file; a machine that restarted has lost its rules."""
    onprem = load("cluster.onprem.yaml")
    for kind in ("head", "worker"):
        commands = onprem[f"{kind}_start_ray_commands"]
        (firewall,) = [index for index, command in enumerate(commands) if "firewall.sh" in command]
        (start,) = [index for index, command in enumerate(commands) if "ray start" in command]
        assert firewall < start


def test_both_files_copy_the_same_to_the_nodes() -> None:
    cloud, onprem = (load(name) for name in FILES)
    assert onprem["file_mounts"].pop("~/gpt-2.5-node/cluster.yaml") == FILES[1]  # for the firewall
    assert cloud["file_mounts"] == onprem["file_mounts"]
    assert all((ROOT / local).exists() for local in cloud["file_mounts"].values() if not local.startswith("~"))


# ---- the scripts that the nodes run ----------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The home of a node, with a `ray` that prints what it was given."""
    (tmp_path / "gpt-2.5-node").mkdir()
    (tmp_path / "gpt-2.5-node/deploy").symlink_to(ROOT / "deploy")
    programs = tmp_path / "gpt-2.5-node/venv/bin"
    programs.mkdir(parents=True)
    (programs / "ray").write_text('#!/bin/sh\necho "$@"; env\n')
    (programs / "ray").chmod(0o755)
    (programs / "python").symlink_to(ROOT / ".venv/bin/python")
    (tmp_path / ".bashrc").write_text(". ~/gpt-2.5-node/deploy/node.sh\n")
    return tmp_path


def on_node(home: Path, command: str) -> dict[str, str]:
    """The environment that the `ray start` of a node sees; its arguments under ``arguments``."""
    result = subprocess.run(
        ["bash", "-c", f". ~/.bashrc; {command}"],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    arguments, *lines = result.stdout.splitlines()
    return {"arguments": arguments, **dict(line.split("=", 1) for line in lines if "=" in line)}


def test_a_head_knows_its_address_and_what_it_serves(node: Path) -> None:
    config = prepare_config(
        {**load("cluster.onprem.yaml"), "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": ["a", "b"]}}
    )
    (node / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    (node / ".gpt-2.5.env").write_text("GPT25_HOME=s3://bucket/folder\nHF_TOKEN='a b'\n")
    (command,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    start = with_envs([command], {"RAY_enable_autoscaler_v2": "1"})[0]  # as `ray up` does
    seen = on_node(node, start)
    assert "--node-ip-address=127.0.0.1" in seen["arguments"] and "--head" in seen["arguments"]
    assert seen["RAY_enable_autoscaler_v2"] == "0"  # the second one would never start a worker
    assert seen["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000" and seen["GPT25_OWN_MLFLOW"] == ""
    assert seen["RAY_AUTH_MODE"] == "token" and seen["GPT25_HOME"] == "s3://bucket/folder" and seen["HF_TOKEN"] == "a b"
    assert seen["GPT25_NODES"] == "3" and seen["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_file_of_settings_is_data_that_no_shell_runs(node: Path) -> None:
    planted = node / "planted"
    (node / ".gpt-2.5.env").write_text(
        f'# a comment\n\nA=$(touch {planted})\nB=`touch {planted}`; touch {planted}\nexport C="two words"\n'
        f"touch {planted}\nD-E=x; touch {planted}\n  F=a=b#c $HOME\nG=last"
    )
    start = with_envs(load("cluster.yaml")["worker_start_ray_commands"], {"RAY_HEAD_IP": "127.0.0.1"})[1]
    seen = on_node(node, start)
    assert not planted.exists()
    assert seen["A"] == f"$(touch {planted})" and seen["B"] == f"`touch {planted}`; touch {planted}"
    assert seen["C"] == "two words" and seen["F"] == "a=b#c $HOME" and seen["G"] == "last"


def test_a_worker_finds_the_head_and_a_server_of_ones_own_is_kept(node: Path) -> None:
    start = with_envs(load("cluster.yaml")["worker_start_ray_commands"], {"RAY_HEAD_IP": "127.0.0.1"})[1]
    seen = on_node(node, start)
    assert "--address=127.0.0.1:6379" in seen["arguments"] and "--node-ip-address=127.0.0.1" in seen["arguments"]
    assert seen["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    (node / ".gpt-2.5.env").write_text("MLFLOW_TRACKING_URI=https://mlflow.example\n")
    seen = on_node(node, start)
    assert seen["MLFLOW_TRACKING_URI"] == "https://mlflow.example" and seen["GPT25_OWN_MLFLOW"] == "1"


def test_the_autoscaling_cloud_head_says_how_many_nodes_are_always_there(node: Path) -> None:
    config = prepare_config(load("cluster.yaml"))
    (node / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    seen = on_node(node, with_envs(config["head_start_ray_commands"], {"RAY_enable_autoscaler_v2": "1"})[1])
    assert seen["GPT25_NODES"] == "1" and seen["RAY_enable_autoscaler_v2"] == "1"
