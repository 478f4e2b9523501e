"""A checkpoint that is not what was written is recognised, whatever was changed, and quarantined; an older is used."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import metadata as checkpoint_metadata
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints.metadata import DamagedError
from pipeline.errors import UserError
from tests.checkpoints.test_writer import WORKERS, info, save

STATE = {"first": torch.arange(300.0).view(30, 10), "second": torch.ones(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints."""
    save(tmp_path / "checkpoints", dict(STATE), 1, 2, 3, keep=3)
    return tmp_path / "checkpoints"


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def tensors(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "length of the header": (lambda path: flip(tensors(path), 0), "another content"),
    "header": (lambda path: flip(tensors(path), header_bytes(tensors(path)) // 2), "another content"),
    "first tensor": (lambda path: flip(tensors(path), header_bytes(tensors(path))), "another content"),
    "last byte": (lambda path: flip(tensors(path), -1, 7), "another content"),
    "truncated": (lambda path: tensors(path).write_bytes(tensors(path).read_bytes()[:-10]), "another size"),
    "longer": (lambda path: tensors(path).write_bytes(tensors(path).read_bytes() + b"x"), "another size"),
    "empty": (lambda path: tensors(path).write_bytes(b""), "another size"),
    "missing": (lambda path: tensors(path).unlink(), "is missing"),
    "tokenizer": (lambda path: flip(path / "tokenizer.json", 0), "tokenizer.json has another content"),
    "description": (lambda path: flip(path / "checkpoint.json", 100), "checkpoint.json"),
    "half a description": (
        lambda path: (path / "checkpoint.json").write_bytes((path / "checkpoint.json").read_bytes()[:99]),
        "checkpoint.json cannot be read",
    ),
    "no description": (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    spoil, reason = DAMAGES[name]
    spoil(folder / "step-000003")
    if name != "no description":
        with pytest.raises(UserError, match=f"damaged: its .*{reason}" if "json" not in reason else reason):
            checkpoint_reader.verify(folder / "step-000003")
    with (
        caplog.at_level(logging.WARNING, logger="pipeline"),
        checkpoint_reader.open_newest(folder, WORKERS) as found,
    ):
        assert found is not None and found.info == info(2) and found.path == folder / "step-000002"
        target = {key: torch.zeros_like(value) for key, value in STATE.items()}
        checkpoint_reader.read_tensors(found.path, target)
    assert all(torch.equal(target[key], value) for key, value in STATE.items())
    (record,) = caplog.records
    assert str(folder / "step-000003") in record.getMessage() and reason in record.getMessage()
    assert (folder / "step-000003.damaged").is_dir() and not (folder / "step-000003").exists()
    assert [step for step, _ in checkpoint_reader.list_checkpoints(folder)] == [1, 2]


def test_several_damaged_ones_are_passed_over_and_none_left_is_an_error(folder: Path) -> None:
    flip(tensors(folder / "step-000003"), -1)
    (folder / "step-000002" / "checkpoint.json").write_text("")
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info.step == 1
    tensors(folder / "step-000001").unlink()
    with (
        pytest.raises(UserError, match=r"no checkpoint in .* can be used, .*\.safetensors is missing"),
        checkpoint_reader.open_newest(folder, WORKERS),
    ):
        pass
    with checkpoint_reader.open_newest(folder / "nowhere", WORKERS) as found:
        assert found is None


def test_a_damaged_one_is_quarantined_over_an_earlier_one(folder: Path) -> None:
    shutil.copytree(folder / "step-000001", folder / "step-000003.damaged")
    flip(tensors(folder / "step-000003"), -1)
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info.step == 2
    assert json.loads((folder / "step-000003.damaged" / "checkpoint.json").read_text())["step"] == 3
    earlier = folder / "step-000003.damaged-2"
    assert json.loads((earlier / "checkpoint.json").read_text())["step"] == 1, "the earlier one is only renamed"


def test_no_flipped_bit_of_the_description_goes_unnoticed(folder: Path) -> None:
    content = (folder / "step-000003" / "checkpoint.json").read_bytes()
    for byte in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[byte] ^= 1 << bit
            if content[byte : byte + 3] == b"e-0" and bit == 5:
                continue  # 1E-05 is the same number
            with pytest.raises(DamagedError):
                checkpoint_metadata.from_bytes(bytes(changed), "here")
    for length in range(len(content) - 1):  # the last byte is the end of the line
        with pytest.raises(DamagedError):
            checkpoint_metadata.from_bytes(content[:length], "here")


def test_no_flipped_bit_of_the_tensors_goes_unnoticed(folder: Path) -> None:
    file, choose = tensors(folder / "step-000003"), random.Random(1)
    content = file.read_bytes()
    for byte in [*range(8), *choose.sample(range(8, len(content)), 100), len(content) - 1]:
        flip(file, byte, choose.randrange(8))
        with pytest.raises(UserError, match="another content"):
            checkpoint_reader.verify(folder / "step-000003")
        file.write_bytes(content)
    checkpoint_reader.verify(folder / "step-000003")


def test_a_checkpoint_of_another_version_is_not_damaged(folder: Path) -> None:
    path = folder / "step-000003" / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    values["format_version"] = 99
    path.write_text(json.dumps(values))
    with (
        pytest.raises(UserError, match="format version 99; this program reads 1 to 2"),
        checkpoint_reader.open_newest(folder, WORKERS),
    ):
        pass
    assert (folder / "step-000003").is_dir(), "nothing is quarantined"


def test_what_a_job_asks_first_passes_over_what_is_plainly_damaged(folder: Path) -> None:
    (folder / "step-000003" / "checkpoint.json").write_text("{")
    tensors(folder / "step-000002").write_bytes(b"short")
    newest = checkpoint_reader.newest_info(folder)
    assert newest is not None and newest[1] == info(1)
    assert (folder / "step-000003").is_dir(), "looking changes nothing"
