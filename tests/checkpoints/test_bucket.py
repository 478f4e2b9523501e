"""Checkpoints and runs in a bucket: complete or absent after a kill, fetched once and verified, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints import writer as checkpoint_writer
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.errors import UserError
from pipeline.pretrained import resolve
from pipeline.storage.folders import Folder, open_folder
from pipeline.training.run_folder import finished_summary
from pipeline.training.trainer import Trainer
from tests.checkpoints.test_writer import WORKERS, info, trained
from tests.support.memory_tracker import MemoryTracker
from tests.support.s3_server import S3
from tests.training.test_trainer import CONFIG, STEPS, train_here


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache, of this test alone."""
    monkeypatch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder: Folder, *steps: int, keep: int = 2) -> dict[str, torch.Tensor]:
    state = checkpoint_writer.training_state(*trained())
    writer = CheckpointWriter(folder, WORKERS, tokenizer_json="{}", keep=keep)
    for step in steps:
        writer.save(state, info(step))
    writer.wait()
    return state


def keys_with(s3: S3, *texts: str) -> list[str]:
    found = s3.keys()
    return [key for key in found if all(text in key for text in texts)]


def test_it_is_complete_last_and_the_oldest_go(s3: S3) -> None:
    folder = open_folder(f"{s3.url}/run/checkpoints")
    save(folder, 1, 2, 3)
    assert checkpoint_directory.list_steps(folder) == [2, 3]
    assert not keys_with(s3, "step-000001")
    writes = [line for line in s3.requests if line.startswith("PUT") and "step-000003" in line]
    assert "checkpoint.json" in writes[-1] and len(writes) == 3


def test_it_is_fetched_once_and_read(s3: S3, cache: Path) -> None:
    state = save(open_folder(f"{s3.url}/run/checkpoints"), 1, 2)
    path = checkpoint_reader.local_checkpoint(f"{s3.url}/run")
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    checkpoint_reader.load_training_state(path, target)
    assert all(torch.equal(target[name], value) for name, value in state.items())
    assert checkpoint_reader.read_info(path) == info(2)
    s3.proxy.forget()
    assert resolve.resolve_checkpoint(f"{s3.url}/run/checkpoints/step-000002") == path
    assert not [line for line in s3.requests if "safetensors" in line]
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        resolve.resolve_checkpoint(f"{s3.url}/nothing")


def test_a_damaged_one_is_no_checkpoint_any_more_and_the_one_before_is_used(
    s3: S3, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(f"{s3.url}/run/checkpoints")
    save(folder, 1, 2, 3, keep=3)
    (key,) = keys_with(s3, "step-000003", "safetensors")
    content = bytearray(s3.get(key))
    content[-1] ^= 1
    s3.put(key, bytes(content))
    (key,) = keys_with(s3, "step-000002", "safetensors")
    s3.put(key, s3.get(key)[:-1])
    with pytest.raises(UserError, match=r"damaged: its shard-.* has another content"):
        checkpoint_reader.local_checkpoint(f"{s3.url}/run")
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info == info(1)
    reasons = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step-000003" in reasons[0] and "another content" in reasons[0]
    assert "step-000002" in reasons[1] and "another size" in reasons[1]
    assert checkpoint_directory.list_steps(folder) == [1]
    assert keys_with(s3, "step-000003/checkpoint.json") == ["run/checkpoints/step-000003/checkpoint.json.damaged"]
    assert not list(cache.rglob("*.safetensors")), "what was read once is gone from the disk"
    save(folder, 4)
    assert keys_with(s3, "step-000003/checkpoint.json.damaged"), "it is no leftover"


@pytest.mark.parametrize("when", ["in a part", "before the description"])
def test_a_kill_in_the_middle_of_an_upload_leaves_the_one_before(s3: S3, cache: Path, when: str) -> None:
    url = f"{s3.url}/run/checkpoints"
    script = str(Path(__file__).parents[1] / "support" / "uploading_process.py")
    result = subprocess.run([sys.executable, script, url, when], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    folder = open_folder(url)
    assert checkpoint_directory.list_steps(folder) == [1]
    begun = keys_with(s3, "step-000002")
    assert len(begun) == (0 if when == "in a part" else 1), "an upload that was not completed is no object"
    target = {"weights": torch.zeros(12_000_000)}
    with checkpoint_reader.open_newest(folder, WORKERS) as found:
        assert found is not None and found.info.step == 1
        checkpoint_reader.read_tensors(found.path, target)
    assert torch.equal(target["weights"], torch.arange(12_000_000, dtype=torch.float32))
    assert bool(list(cache.rglob("saving/**/*.safetensors"))) == (when == "in a part")
    CheckpointWriter(folder, WORKERS, tokenizer_json="{}", keep=2)
    assert not keys_with(s3, "step-000002") and not list(cache.rglob("saving/**/*.safetensors"))


def test_a_run_in_a_bucket_goes_on_with_the_bits_of_an_uninterrupted_one(
    s3: S3, tiny_data: Path, tmp_path: Path
) -> None:
    expected, _ = train_here(CONFIG, tiny_data, tmp_path / "clean")
    output = open_folder(f"{s3.url}/run")
    assert finished_summary(CONFIG, data=tiny_data, output=output) is None
    trainer = Trainer(CONFIG, data=tiny_data, output=output, workers=WORKERS, tracker=MemoryTracker())
    for step in range(7):
        trainer.advance(step)
    trainer.writer.wait()
    resumed = Trainer(CONFIG, data=tiny_data, output=output, workers=WORKERS, tracker=MemoryTracker())
    assert resumed.start_step == 5
    summary = resumed.run()
    assert summary.last_loss == expected.last_loss and summary.val_loss == expected.val_loss
    assert finished_summary(CONFIG, data=tiny_data, output=output) == summary
    found, clean = (load_file(tensors_of(place)) for place in (summary.checkpoint, expected.checkpoint))
    assert found.keys() == clean.keys() and all(torch.equal(found[name], clean[name]) for name in clean)
    second = dataclasses.replace(CONFIG, checkpoint=summary.checkpoint, lr=1e-9, train_steps=1)
    started, _ = train_here(second, tiny_data, tmp_path / "second")
    assert started.val_loss == pytest.approx(summary.val_loss, abs=1e-4)
    assert summary.steps == STEPS


def tensors_of(place: str) -> Path:
    (file,) = checkpoint_reader.local_checkpoint(place).glob("*.safetensors")
    return file
