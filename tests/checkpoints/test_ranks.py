"""Checkpoints of several ranks: all see the same damage and the same failure; one process puts the parts together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints import reader as checkpoint_reader
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """Folder, what each rank saw, and what they logged."""
    folder = tmp_path_factory.mktemp("ranks")
    result = run_ranks("checkpoint_process.py", folder, world_size=2)
    assert result.returncode == 0, result.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)], result.stderr


def test_all_ranks_pass_over_what_one_of_them_found_damaged(ranks: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, seen, log = ranks
    for rank in seen:
        assert rank["saved"] == [1, 2]
        assert rank["resumed"] == [1, str(folder / "checkpoints" / "step-000001")] and rank["equal"]
    assert (folder / "checkpoints" / "step-000002.damaged").is_dir()
    (warning,) = [line for line in log.splitlines() if "is damaged" in line and "step-000002" in line]
    assert "shard-00002-model-00001-of-00001.safetensors has another content" in warning


def test_a_rank_that_cannot_write_ends_the_save_of_all(ranks: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, seen, _ = ranks
    assert all("step-000003.incomplete is full" in rank["failure"] for rank in seen)
    assert all(rank["steps"] == [1] for rank in seen)
    assert not list((folder / "checkpoints").glob("*.incomplete"))


def test_all_ranks_end_where_no_checkpoint_is_sound(ranks: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, seen, _ = ranks
    assert all("no checkpoint in" in rank["nothing left"] for rank in seen)


def test_one_process_puts_the_parts_of_two_together(ranks: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, _, _ = ranks
    whole = load_file(folder / "whole.safetensors")
    target = {name: torch.zeros_like(value) for name, value in whole.items()}
    path = folder / "checkpoints" / "step-000004.damaged"
    checkpoint_reader.read_tensors(path, target)
    assert all(torch.equal(target[name], value) for name, value in whole.items())
