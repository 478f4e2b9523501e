"""A checkpoint of somebody else is what its description says, and asks for no more memory than its files hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints import metadata as checkpoint_metadata
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints import writer as checkpoint_writer
from pipeline.errors import UserError
from pipeline.pretrained import weights
from tests.checkpoints.test_writer import WORKERS, save, trained

STATE = {"first": torch.arange(300.0).view(30, 10), "second": torch.ones(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints."""
    save(tmp_path / "checkpoints", dict(STATE), 1, 2, keep=2)
    return tmp_path / "checkpoints"


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change checkpoint.json as somebody would who wants it to be believed: its own sha256 is right."""
    path = checkpoint / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    change(values)
    path.write_text(json.dumps({**values, "sha256": checkpoint_metadata._checksum(values)}))


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(value) for name, value in STATE.items()}
    checkpoint_reader.load_training_state(checkpoint, found)
    return found


@pytest.mark.parametrize("name", ["aaa.safetensors", "zzz.safetensors"])
def test_a_file_that_is_put_beside_replaces_no_weights(folder: Path, name: str) -> None:
    poison = {tensor: torch.full_like(value, 666.0) for tensor, value in STATE.items()}
    save_file(poison, folder / "step-000002" / name)
    assert all(torch.equal(value, STATE[tensor]) for tensor, value in read(folder / "step-000002").items())


def test_a_file_of_garbage_beside_is_not_opened(folder: Path) -> None:
    (folder / "step-000002" / "x.safetensors").write_bytes(b"\xff" * 100)
    assert torch.equal(read(folder / "step-000002")["first"], STATE["first"])


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda values: values["files"].clear(),
    "the tokenizer alone": lambda values: [values["files"].pop(n) for n in list(values["files"]) if "safe" in n],
    "a file above": lambda values: values["files"].update({"../x": {"bytes": 1, "sha256": "0"}}),
    "an absolute name": lambda values: values["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}),
    "a name with a null": lambda values: values["files"].update({"a\0b": {"bytes": 1, "sha256": "0"}}),
    "files as a list": lambda values: values.update(files=list(values["files"])),
    "a size in words": lambda values: values["files"].update({"x.safetensors": {"bytes": "many", "sha256": "0"}}),
    "a step in words": lambda values: values.update(step="two"),
    "a model of words": lambda values: values.update(model="large"),
    "a model with a setting of somebody": lambda values: values["model"].update(code="import os"),
    "a negative width": lambda values: values["model"].update(d_model=-32),
    "settings in a list": lambda values: values.update(config=[1]),
    "deep settings": lambda values: values.update(config={"x": json.loads("[" * 500 + "]" * 500)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_description_that_cannot_be_right_is_damage_and_the_one_before_is_used(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(folder / "step-000002", change)
    with pytest.raises(UserError, match=r"its checkpoint\.json "):
        checkpoint_reader.read_description(checkpoint_reader.as_folder(folder / "step-000002"))
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info.step == 1
    assert (folder / "step-000002.damaged").is_dir()


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"7", b'"x"', b"[" * 100_000, b"{}", b"", b"\xff\xfe", b"9" * 9999]
)
def test_a_description_of_another_kind_is_damage(folder: Path, content: bytes) -> None:
    (folder / "step-000002" / "checkpoint.json").write_bytes(content)
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info.step == 1


@pytest.mark.parametrize("version", [3, "2", [2], {"a": 1}, None, "x" * 10_000])
def test_another_version_is_named_in_a_bounded_sentence(folder: Path, version: object) -> None:
    rewrite(folder / "step-000002", lambda values: values.update(format_version=version))
    with pytest.raises(UserError, match="has format version") as caught:
        checkpoint_reader.read_description(checkpoint_reader.as_folder(folder / "step-000002"))
    assert len(str(caught.value)) < 500


# ---- its network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a network."""
    save(tmp_path / "checkpoints", checkpoint_writer.training_state(*trained()), 5)
    return tmp_path / "checkpoints/step-000005"


def test_the_network_of_a_sound_checkpoint(checkpoint: Path) -> None:
    assert weights.read_model_config(checkpoint) == trained()[0].config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_layers", count) for count in (1, 3, 10**9, 10**30)),
        *(("vocab_size", count) for count in (64, 600, 10**12)),
        *(("d_ff", count) for count in (32, 10**12)),
        *(("context_length", count) for count in (2**21, 10**15)),
        ("tie_embeddings", False),
    ],
)
def test_a_network_that_the_files_do_not_hold_is_refused_before_memory_is_taken(
    checkpoint: Path, name: str, value: object
) -> None:
    rewrite(checkpoint, lambda values: values["model"].update({name: value}))
    with pytest.raises(UserError, match=r"checkpoint\.json (describes|asks for)"):
        weights.read_model_config(checkpoint)


def test_a_tensor_of_which_a_part_is_missing_is_refused(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    sharding["model.embedding.weight"]["saved_offsets"] = [64, 0]
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    rewrite(checkpoint, lambda values: values["files"].update({file.name: entry}))
    with pytest.raises(UserError, match=r"does not hold all of the tensor model\.embedding\.weight"):
        weights.read_model_config(checkpoint)


def test_a_copy_of_a_run_is_read_wherever_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert weights.read_model_config(tmp_path / "elsewhere") == trained()[0].config
