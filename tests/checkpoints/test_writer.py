"""Checkpoints are complete or absent, readable by others, without pickle; the right ones stay. (One rank, a disk.)"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.config import ModelConfig
from model.optimizer import AdamW, parameter_groups
from model.transformer import Transformer, init_weights
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints import staging as checkpoint_staging
from pipeline.checkpoints import writer as checkpoint_writer
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError

MODEL = ModelConfig(vocab_size=300, context_length=16, num_layers=2, num_heads=2, d_model=32, d_ff=64)
WORKERS = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


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


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in checkpoint_reader.list_checkpoints(folder)]


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, checkpoint_writer.training_state(model, optimizer), 7)
    other, other_optimizer = trained(seed=1)
    target = checkpoint_writer.training_state(other, other_optimizer)
    checkpoint_reader.load_training_state(tmp_path / "step-000007", target)
    for name, value in checkpoint_writer.training_state(model, optimizer).items():
        assert torch.equal(target[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert checkpoint_reader.read_info(tmp_path / "step-000007") == info(7)


def test_what_somebody_put_into_the_folder_of_the_checkpoints_is_never_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    save(tmp_path, state, 1)
    (tmp_path / "step-000001" / "base-F32.gguf").write_text("precious")
    (tmp_path / "step-notes.incomplete").mkdir()
    (tmp_path / "step-notes.incomplete" / "notes").write_text("precious")
    save(tmp_path, state, 2, 3, 4, 5)
    assert steps_in(tmp_path) == [1, 4, 5], "the others are removed as ever"
    assert (tmp_path / "step-000001" / "base-F32.gguf").read_text() == "precious"
    assert (tmp_path / "step-notes.incomplete" / "notes").read_text() == "precious"
    assert caplog.text.count("stays, because it holds what no save wrote: base-F32.gguf") == 1


def test_a_step_that_is_saved_again_keeps_the_files_of_others(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    save(tmp_path, state, 1)
    (tmp_path / "step-000001" / "export").mkdir()
    (tmp_path / "step-000001" / "export" / "model.gguf").write_text("precious")
    save(tmp_path, state, 1)
    assert (tmp_path / "step-000001" / "export" / "model.gguf").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]


def test_tensors_of_any_type_and_size_are_aligned_and_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "count": torch.tensor([1, 2, 3]),
        "single": torch.randn(7, generator=generator),
        "scalar": torch.tensor(0.5, dtype=torch.float64),
    }
    save(tmp_path, state, 1)
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    checkpoint_reader.load_training_state(tmp_path / "step-000001", target)
    assert all(torch.equal(target[name], value) for name, value in state.items())


def test_training_may_go_on_while_the_state_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    before = {name: value.clone() for name, value in state.items()}
    writer = CheckpointWriter(tmp_path, WORKERS, keep=1, tokenizer_json="{}")
    writer.reserve(state)
    writer.save(state, info(1))
    for value in state.values():
        value.fill_(99.0)
    writer.wait()
    checkpoint_reader.load_training_state(tmp_path / "step-000001", state)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_only_the_copy_keeps_training_waiting_and_its_memory_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    writer = CheckpointWriter(tmp_path, WORKERS, keep=2, tokenizer_json="{}")
    writer.save(state, info(1))
    writer.wait()
    copies = [writer._staged]
    may_write, write = threading.Event(), dcp.save

    def wait_and_write(*arguments: Any, **options: Any) -> object:
        assert may_write.wait(1200)
        return write(*arguments, **options)

    monkeypatch.setattr(dcp, "save", wait_and_write)
    writer.save(state, info(2))  # comes back although nothing can be written
    copies.append(writer._staged)
    assert steps_in(tmp_path) == [1] and writer.error() is None and writer.stall_seconds > 0
    may_write.set()
    writer.wait()
    assert steps_in(tmp_path) == [1, 2] and copies[0] is copies[1]


def test_the_files_are_safetensors_that_any_tool_reads(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, checkpoint_writer.training_state(model, optimizer), 1)
    files = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert [name for name in files if not name.endswith(".safetensors")] == ["checkpoint.json", "tokenizer.json"]
    with safe_open(tmp_path / "step-000001" / files[1], framework="pt") as file:
        assert torch.equal(file.get_tensor("model.embedding.weight"), model.embedding.weight)


def test_a_large_part_is_divided_among_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_staging, "_FILE_BYTES", 20_000)
    state = checkpoint_writer.training_state(*trained())
    save(tmp_path, state, 1)
    files = [load_file(path) for path in (tmp_path / "step-000001").glob("shard-00001-model-*-of-*.safetensors")]
    assert len(files) > 5
    assert all(len(file) == 1 or sum(value.nbytes for value in file.values()) <= 20_000 for file in files)
    assert sorted(name for file in files for name in file) == sorted(state)
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    checkpoint_reader.load_training_state(tmp_path / "step-000001", target)
    assert all(torch.equal(target[name], value) for name, value in state.items())


@pytest.mark.parametrize("world_size", [1, 3, 4, 64])
def test_pinned_memory_holds_the_recipe_with_little_left_over(world_size: int) -> None:
    config = ModelConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048)
    with torch.device("meta"):
        model = Transformer(config)
    rows = [(-(-p.shape[0] // world_size), p[0].numel()) for p in model.parameters() for _ in range(3)]
    sizes = [4 * count * width for count, width in rows]
    places, block_bytes = checkpoint_staging.pack(sizes)
    assert all(count.bit_count() == 1 for count in block_bytes), "torch rounds nothing up"
    assert sum(block_bytes) < 1.01 * sum(sizes)
    for block, count in enumerate(block_bytes):
        taken = sorted((start, start + sizes[i]) for i, (b, start) in enumerate(places) if b == block)
        assert taken[-1][1] <= count
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))


@given(st.lists(st.integers(0, 5000), max_size=40))
def test_any_parts_have_places_of_their_own(sizes: list[int]) -> None:
    allocated: list[int] = []

    def allocate(count: int) -> torch.Tensor:
        allocated.append(count)
        return torch.empty(count, dtype=torch.uint8)

    originals = [torch.full((size,), number, dtype=torch.bfloat16) for number, size in enumerate(sizes)]
    found = checkpoint_staging.pinned_like(originals, allocate)
    for part, original in zip(found, originals, strict=True):
        part.copy_(original)
    for part, original in zip(found, originals, strict=True):
        assert torch.equal(part, original) and part.dtype == torch.bfloat16
        assert part.untyped_storage().nbytes() == original.nbytes, "or it is copied before it is written"
        assert part.data_ptr() % 64 == 0 or not part.numel()
    assert sum(allocated) <= 2 * sum(-(-2 * size // 64) * 64 for size in sizes)


def test_files_written_from_pinned_memory_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = checkpoint_writer.training_state(*trained())
    save(tmp_path / "plain", state, 1)

    def packed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return checkpoint_staging.pinned_like(tensors, lambda count: torch.empty(count, dtype=torch.uint8))

    monkeypatch.setattr(checkpoint_staging, "empty_like", packed)
    save(tmp_path / "packed", state, 1)
    for path in (tmp_path / "plain").rglob("*.safetensors"):  # the order of a file's own notes is drawn
        plain, found = load_file(path), load_file(tmp_path / "packed" / path.relative_to(tmp_path / "plain"))
        assert plain.keys() == found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert all(torch.equal(plain[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_of_version_1_is_read(tmp_path: Path) -> None:
    """As it was: tensors written by torch, sizes in place of checksums, no field that came later."""
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    dcp.save(
        dict(state),
        storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True),
        no_dist=True,
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    values = dataclasses.asdict(info(3))
    del values["skipped_steps"]
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    versions = {"python": "3.11", "torch": "2.13"}
    (tmp_path / "checkpoint.json").write_text(
        json.dumps({"format_version": 1, **values, "versions": versions, "files": files})
    )
    other, other_optimizer = trained(seed=1)
    target = checkpoint_writer.training_state(other, other_optimizer)
    checkpoint_reader.load_training_state(tmp_path, target)
    assert all(torch.equal(target[name], value) for name, value in state.items())
    assert checkpoint_reader.read_info(tmp_path) == info(3)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json has another size"):
        checkpoint_reader.verify(tmp_path)


def test_the_description_names_every_file_with_its_sha256(tmp_path: Path) -> None:
    save(tmp_path, checkpoint_writer.training_state(*trained()), 1)
    folder = tmp_path / "step-000001"
    values = json.loads((folder / "checkpoint.json").read_text())
    others = [path for path in folder.iterdir() if path.name != "checkpoint.json"]
    assert values["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in others
    }
    assert values["format_version"] == 2


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    for leftover in ("step-000003.incomplete", "step-000004-old.incomplete", "step-000005-before.incomplete"):
        (tmp_path / leftover).mkdir(parents=True)
    save(tmp_path, checkpoint_writer.training_state(*trained()), 5, 20, 100, keep=2)
    assert steps_in(tmp_path) == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000100"]


def test_every_nth_and_those_named_stay(tmp_path: Path) -> None:
    state, best = {"x": torch.zeros(3)}, {3}
    writer = CheckpointWriter(
        tmp_path, WORKERS, tokenizer_json="{}", keep=2, keep_every=10, also_keep=lambda: frozenset(best)
    )
    for step in (3, 5, 10, 15, 20):
        writer.save(state, info(step))
    writer.wait()
    assert steps_in(tmp_path) == [3, 10, 15, 20]
    best.clear()
    for step in (25, 30, 33):
        writer.save(state, info(step))
    writer.wait()
    assert steps_in(tmp_path) == [10, 20, 30, 33]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint_writer.training_state(model, optimizer)
    save(tmp_path, state, 5)
    state["model.norm.weight"].fill_(3.0)
    save(tmp_path, state, 5)
    other, _ = trained()
    checkpoint_reader.load_weights(tmp_path / "step-000005", other)
    assert torch.equal(other.norm.weight, torch.full((32,), 3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", checkpoint_writer.training_state(*trained()), 5, 9)
    newest = tmp_path / "checkpoints" / "step-000009"
    assert checkpoint_reader.local_checkpoint(tmp_path) == newest == checkpoint_reader.local_checkpoint(str(newest))
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        checkpoint_reader.local_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_of_another_shape_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="d_ff 64, but this run asks for 128"):
        shape = dataclasses.replace(MODEL, d_ff=128)
        checkpoint_reader.check_shape(str(tmp_path), info(1).model, shape, otherwise="start anew")


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk takes root")
    try:
        state = checkpoint_writer.training_state(*trained())  # about 350 KB
        folder = tmp_path / "checkpoints"
        writer = save(folder, state, 1)
        (tmp_path / "ballast").write_bytes(bytes(500_000))
        writer.save(state, info(2))
        error = wait_for_error(writer)
        assert f"the disk of {folder}" in str(error) and "is full" in str(error)
        with pytest.raises(UserError, match="is full"):
            writer.wait()
        assert [path.name for path in folder.iterdir()] == ["step-000001"], "what was begun is gone"
        checkpoint_reader.load_training_state(folder / "step-000001", state)
        (tmp_path / "ballast").unlink()
        writer.save(state, info(3))
        writer.wait()
        assert steps_in(folder) == [1, 3], "with room again it goes on"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def wait_for_error(writer: CheckpointWriter) -> UserError:
    """What error() gives once the save in the background has ended; itself it never waits."""
    assert writer._pending is not None
    writer._pending.exception(60)
    error = writer.error()
    assert error is not None
    return error


def test_a_lost_folder_is_known_without_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    state = {"x": torch.zeros(3)}
    writer = save(folder, state, 1)
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("in the way")
    assert writer.error() is None
    writer.save(state, info(2))
    assert str(folder) in str(wait_for_error(writer))
    with pytest.raises(UserError, match="cannot be"):
        writer.save(state, info(3))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        CheckpointWriter(tmp_path / "file" / "checkpoints", WORKERS, keep=1, tokenizer_json="{}")
