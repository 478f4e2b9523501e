"""--packing best_fit in a run, with the document mask: its windows, bitwise resume, what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints.reader import read_description
from pipeline.dataset.batches import permute
from pipeline.dataset.manifest import CHAT_TEMPLATE, Manifest
from pipeline.dataset.packed_documents import describe_packing
from pipeline.errors import UserError
from pipeline.storage.folders import CACHE_VARIABLE, open_folder
from pipeline.training.run_folder import check_resumable, finished_summary, open_data_of_run
from tests.dataset.test_packed_documents import best_fit_windows
from tests.support.fixtures import ROOT
from tests.support.sources import make_documents
from tests.training.test_trainer import CONFIG, STEPS, Run, checkpoint_tensors, read_shard, run, train_here

__all__ = ["run"]  # a fixture

PACKED = dataclasses.replace(CONFIG, packing="best_fit", document_mask=True, val_tokens=1000)
LENGTH = CONFIG.context_length + 1


@pytest.fixture
def documents(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of documents, most of which fit into a window of 33 tokens; the ranks share a cache of their own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    lengths = np.random.default_rng(5).integers(2, 40, 500).tolist()
    shards = {"train_000000.bin": lengths[:200], "train_000001.bin": lengths[200:400], "val_000000.bin": lengths[400:]}
    return make_documents(tmp_path / "short", tiny_data, shards)


def test_ranks_read_the_packed_windows_and_resume_bit_for_bit(run: Run, documents: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"settings_of": PACKED, "data": [documents]}
    _, tracker = train_here(PACKED, documents, tmp_path / "one")
    clean = run(2, "clean", **given)
    assert clean["losses"] == pytest.approx(dict(tracker.metrics["train/loss"]), rel=1e-4)
    run(2, "broken", stop_after=7, **given)
    resumed = run(2, "broken", **given)
    assert resumed["start_step"] == 5
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if step > 5}
    expected, found = checkpoint_tensors(tmp_path / "clean"), checkpoint_tensors(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (
        read_description(open_folder(tmp_path / "clean" / "checkpoints" / f"step-{STEPS:06d}")).info.config["packing"]
        == "best_fit"
    )

    tokens = np.concatenate([read_shard(documents / f"train_{index:06d}.bin") for index in range(2)])
    eot_id = Manifest.load(documents).eot_id
    texts = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == eot_id)[1:])]
    zeros = [[0 if token == eot_id else token + 1 for token in text] for text in texts]  # as that packing has them
    num_windows = len(best_fit_windows(zeros, LENGTH))
    order = permute(np.arange(STEPS * 12), size=num_windows, seed=CONFIG.seed, epoch=0)
    assert num_windows > STEPS * 12, "no window twice"
    assert len({*map(tuple, clean["windows"])}) == len({*order.tolist()}) == STEPS * 12
    whole = {tuple(text) for text in texts if len(text) <= LENGTH}
    held = 0
    for window in clean["windows"]:
        begins = [place for place, token in enumerate(window) if token == eot_id]
        assert begins, "a document begins in every window"
        parts = [tuple(part.tolist()) for part in np.split(np.array(window), begins) if len(part)]
        assert all(part in whole for part in parts[1:-1]), "none that fits is cut inside a window"
        held += sum(part in whole for part in parts)
    assert held > STEPS * 12


def test_another_packing_is_another_order(documents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, train_steps=2, val_every=0)
    summary, _ = train_here(config, documents, tmp_path / "run")
    packed = dataclasses.replace(config, packing="best_fit")
    with pytest.raises(UserError, match="was trained with packing sequential, now it is best_fit; that changes the d"):
        finished_summary(packed, data=documents, output=tmp_path / "run")
    place = open_folder(summary.checkpoint)
    info, data = read_description(place).info, open_data_of_run(config, documents)
    older = {name: value for name, value in info.config.items() if name not in {"packing", "document_mask"}}
    check_resumable(place, dataclasses.replace(info, config=older), config, data)
    with pytest.raises(UserError, match="with packing sequential, now it is best_fit"):
        check_resumable(place, dataclasses.replace(info, config=older), packed, data)


def test_conversations_are_not_packed_again(documents: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(documents)
    settings = manifest.settings | {CHAT_TEMPLATE: "chatml", "context_length": CONFIG.context_length}
    dataclasses.replace(manifest, settings=settings).save(documents)
    with pytest.raises(UserError, match="holds conversations, which lie in windows of their own already; leave --pack"):
        finished_summary(PACKED, data=documents, output=tmp_path / "run")


def test_a_dry_run_tells_the_share(documents: Path) -> None:
    flags = ["--data", str(documents), "--context_length", "32", "--tokens_per_step", "512", "--num_workers", "1"]
    command = [sys.executable, "jobs/pretrain.py", *flags, "--packing", "best_fit", "--dry_run"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600).stdout
    sentence = describe_packing(open_folder(documents), window_length=LENGTH)
    assert sentence.startswith("best-fit packing: 400 documents in ") and sentence.endswith("; none is cropped")
    assert sentence in " ".join(printed.split())
