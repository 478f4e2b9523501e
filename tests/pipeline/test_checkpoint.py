"""Checkpoints are complete or absent, readable by others, without pickle; damage is named. (One rank.)"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig
from model.optimizer import AdamW, parameter_groups
from model.transformer import Transformer, init_weights
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointInfo, CheckpointWriter
from pipeline.errors import UserError
from pipeline.parallel import Workers

MODEL = ModelConfig(vocab_size=300, context_length=16, num_layers=2, num_heads=2, d_model=32, d_ff=64)
WORKERS = Workers(rank=0, world_size=1, device=torch.device("cpu"))


def trained(seed: int = 0) -> tuple[Transformer, AdamW]:
    """A network and optimizer after two steps, so that the moments are not zero."""
    model = Transformer(MODEL)
    init_weights(model, seed)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        tokens_seen=step * 10,
        first_loss=6.0,
        last_loss=5.0,
        model=MODEL.to_dict(),
        config={"lr": 0.1},
        data="data/x",
        manifest_fingerprint="m",
        tokenizer_fingerprint="t",
        world_size=1,
    )


def save(folder: Path, state: dict[str, Tensor], *steps: int, keep: int = 2) -> CheckpointWriter:
    writer = CheckpointWriter(folder, WORKERS, keep=keep, tokenizer_json="{}")
    for step in steps:
        writer.save(state, info(step))
    writer.wait()
    return writer


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, checkpoint.training_state(model, optimizer), 7)
    other, other_optimizer = trained(seed=1)
    target = checkpoint.training_state(other, other_optimizer)
    checkpoint.load_training_state(tmp_path / "step-000007", target)
    for name, value in checkpoint.training_state(model, optimizer).items():
        assert torch.equal(target[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert checkpoint.read_info(tmp_path / "step-000007") == info(7)


def test_training_may_go_on_while_the_state_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint.training_state(model, optimizer)
    before = {name: value.clone() for name, value in state.items()}
    writer = CheckpointWriter(tmp_path, WORKERS, keep=1, tokenizer_json="{}")
    writer.save(state, info(1))
    for value in state.values():
        value.fill_(99.0)
    writer.wait()
    checkpoint.load_training_state(tmp_path / "step-000001", state)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_the_files_are_safetensors_that_any_tool_reads(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, checkpoint.training_state(model, optimizer), 1)
    files = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert [name for name in files if not name.endswith(".safetensors")] == ["checkpoint.json", "tokenizer.json"]
    with safe_open(tmp_path / "step-000001" / files[1], framework="pt") as file:
        assert torch.equal(file.get_tensor("model.embedding.weight"), model.embedding.weight)


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "step-000003.incomplete").mkdir(parents=True)
    save(tmp_path, checkpoint.training_state(model, optimizer), 5, 20, 100, keep=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000100"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint.training_state(model, optimizer)
    save(tmp_path, state, 5)
    state["model.norm.weight"].fill_(3.0)
    save(tmp_path, state, 5)
    other, _ = trained()
    checkpoint.load_weights(tmp_path / "step-000005", other)
    assert torch.equal(other.norm.weight, torch.full((32,), 3.0))


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path / "checkpoints", checkpoint.training_state(model, optimizer), 5, 9)
    newest = tmp_path / "checkpoints" / "step-000009"
    assert checkpoint.find_checkpoint(tmp_path) == newest == checkpoint.find_checkpoint(newest)
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        checkpoint.find_checkpoint(tmp_path / "nowhere")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint.training_state(model, optimizer)
    save(tmp_path, state, 1)
    file = next((tmp_path / "step-000001").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{file.name} is missing or truncated"):
        checkpoint.load_training_state(tmp_path / "step-000001", state)


def test_a_checkpoint_of_another_shape_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="d_ff 64, but this run asks for 128"):
        checkpoint.check_shape(tmp_path, info(1), dataclasses.replace(MODEL, d_ff=128))


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged: checkpoint\.json cannot be read"):
        checkpoint.read_info(tmp_path)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        checkpoint.read_info(tmp_path)


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk takes root")
    try:
        model, optimizer = trained()
        state = checkpoint.training_state(model, optimizer)  # about 350 KB
        save(tmp_path / "checkpoints", state, 1)
        (tmp_path / "ballast").write_bytes(bytes(250_000))
        with pytest.raises(UserError, match="No space left on device"):
            save(tmp_path / "checkpoints", state, 2)
        assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [1]
        checkpoint.load_training_state(tmp_path / "checkpoints" / "step-000001", state)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "checkpoints", WORKERS, keep=1, tokenizer_json="{}")
