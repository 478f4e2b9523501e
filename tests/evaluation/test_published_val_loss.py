"""The val loss that llm.c and modded-nanogpt publish: ours, after import and training, is transformers' on the file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config.data import ImportShardsConfig
from pipeline.config.inference import EvaluateConfig
from pipeline.dataset.shards import open_split
from pipeline.evaluation import evaluate_job
from pipeline.preprocessing.import_job import ShardImport
from pipeline.pretrained import resolve
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.training.trainer import Trainer
from tests.support.fake_hub import NAME, running_hub
from tests.support.llama_twin import llama_twin
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE, run_config

LENGTH = 32
VAL_TOKENS = LENGTH * 30


@pytest.fixture(scope="module")
def text_tokens(tiny_data: Path) -> list[np.ndarray]:
    """Ids of three files: two to train on and one held out."""
    train, val = (open_split(tiny_data, split) for split in ("train", "val"))
    return [train.read(0, 20_000), train.read(20_000, 20_000), val.read(0, len(val))]


@pytest.fixture(scope="module", params=["with headers", "headerless"])
def files(
    request: pytest.FixtureRequest, text_tokens: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files as llm.c writes them, 256 int32 in front, or as nanoGPT does, with nothing."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, tokens in zip(("train_000001.bin", "train_000002.bin", "val_000000.bin"), text_tokens, strict=True):
        header = np.zeros(256 if request.param == "with headers" else 0, dtype=np.int32)
        header[:3] = [20240520, 1, len(tokens)][: len(header)]
        with (folder / name).open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(np.uint16).tobytes())
    return folder


def has_header(path: Path) -> bool:
    return int(np.fromfile(path, dtype=np.int32, count=1)[0]) == 20240520


@torch.no_grad()
def theirs(model: torch.nn.Module, tokens: np.ndarray, num_tokens: int) -> float:
    """As llm.c and modded-nanogpt count: targets are the inputs one further on, and the next window begins behind."""
    losses = []
    for start in range(0, num_tokens, LENGTH):
        window = torch.from_numpy(tokens[start : start + LENGTH + 1].astype(np.int64))
        logits = model(window[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits.float(), window[1:]).item())
    return sum(losses) / len(losses)


@pytest.fixture(params=["disk", "hub"])
def place(request: pytest.FixtureRequest, files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the files are: a folder, or a data set of a local server that answers as the hub does."""
    if request.param == "disk":
        yield str(files)
        return
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub({path.name: path.read_bytes() for path in files.iterdir()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield f"hf://datasets/{NAME}"


def test_import_training_and_the_val_loss_of_transformers(
    files: Path, place: str, tiny_data: Path, tmp_path: Path
) -> None:
    data, run = open_folder(tmp_path / "data"), tmp_path / "run"
    data.make()
    headerless = not has_header(files / "val_000000.bin")
    ShardImport(
        ImportShardsConfig(
            train=f"{place}/train_*.bin",
            val=f"{place}/val_*.bin",
            output=str(data),
            headerless=headerless,
            tokenizer=str(tiny_data / "tokenizer.json"),
        )
    ).run(data)
    config = run_config(context_length=LENGTH, train_steps=20, val_every=20, val_tokens=VAL_TOKENS)
    tracker = MemoryTracker()
    Trainer(config, data=data, output=run, workers=ALONE, tracker=tracker).run()
    evaluation = EvaluateConfig(checkpoint=str(run), val_tokens=VAL_TOKENS, batch_size=7, device="cpu")
    scores = evaluate_job.evaluate(evaluation)

    found = resolve.open_model(run / "checkpoints/step-000020", torch.device("cpu"))
    tokens = np.fromfile(files / "val_000000.bin", dtype=np.uint16, offset=0 if headerless else 1024)
    expected = theirs(llama_twin(found.model), tokens, VAL_TOKENS)
    assert scores.val_tokens == VAL_TOKENS and scores.val_loss is not None and scores.perplexity is not None
    assert scores.val_loss == pytest.approx(expected, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    tokenizer = Tokenizer.from_file(tiny_data / "tokenizer.json")
    targets = [token for token in tokens[1 : VAL_TOKENS + 1].tolist() if token != tokenizer.eot_id]
    bits = expected * VAL_TOKENS / math.log(2) / len(tokenizer.decode_bytes(targets))
    assert scores.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert tracker.metrics["val/loss"] == [(20, pytest.approx(expected, rel=1e-5))]
    assert tracker.metrics["val/bits_per_byte"] == [(20, pytest.approx(bits, rel=1e-5))]

    assert evaluate_job.evaluate(evaluation, reuse=True) == scores
    whole = evaluate_job.evaluate(dataclasses.replace(evaluation, val_tokens=None), reuse=True)
    assert whole.val_tokens == len(tokens) - 1, "another part of the val set is another result"
