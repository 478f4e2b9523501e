"""The nodes that an estimate is for: numbers, the project's own cluster file, and files that say nothing of use."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.estimation.nodes import Nodes, find_nodes
from tests.support.fixtures import ROOT


def test_numbers() -> None:
    assert find_nodes("8x16") == Nodes(count=8, cpus=128, source="--nodes")


def test_the_projects_cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight nodes of 16 CPUs for tokenization; neither the head, which takes no tasks, nor the one with GPUs."""
    monkeypatch.delenv("GPT25_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_nodes(None) is None
    found = find_nodes(str(ROOT / "cluster.yaml"))
    assert found == Nodes(count=8, cpus=128, source=str(ROOT / "cluster.yaml"), idle_seconds=600.0)
    monkeypatch.chdir(ROOT)
    assert find_nodes(None) == Nodes(count=8, cpus=128, source="cluster.yaml", idle_seconds=600.0)


def test_several_types_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "head_node_type: head\n"
        "available_node_types:\n"
        "  head: {resources: {CPU: 4}, max_workers: 1}\n"
        "  small: {resources: {CPU: 4}, max_workers: 3}\n"
        "  large: {resources: {CPU: 32}, max_workers: 2}\n"
        "  none: {resources: {CPU: 32}, max_workers: 0}\n"
        "  gpu: {resources: {CPU: 64, GPU: 1}, max_workers: 2}\n"
        "  unknown: {max_workers: 2}\n"
    )
    found = find_nodes(str(tmp_path / "two.yaml"))
    assert found == Nodes(count=5, cpus=76, source=str(tmp_path / "two.yaml"))


@pytest.mark.parametrize("wanted", ["0x16", "8x", "8 x 16", "absent.yaml", str(ROOT / "cluster.onprem.yaml")])
def test_what_names_no_nodes(wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nodes: .*NUMBERxCPUS"):
        find_nodes(wanted)


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "available_node_types: {a: {resources: {CPU: .inf}}}", "\0"])
def test_a_bad_cluster_file_is_an_error_where_it_is_named_only(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GPT25_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(content)
    assert find_nodes(None) is None
    with pytest.raises(UserError, match="nodes: "):
        find_nodes("cluster.yaml")
