"""hf://OWNER/NAME of the published GPT-2.5, from a hub on this machine, through every job; none runs its code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from pipeline.config.data import ImportShardsConfig
from pipeline.config.inference import EvaluateConfig, ExportConfig, GenerateConfig
from pipeline.evaluation import evaluate_job
from pipeline.generation.generate_job import generate_texts
from pipeline.preprocessing.import_job import ShardImport
from pipeline.pretrained.export_job import export
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from tests.pretrained.test_hub_models import job
from tests.support.fake_model_hub import FakeModelHub, running_model_hub
from tests.support.published_network import PublishedNetwork, chat_tokenizer
from tests.support.web_server import running

NETWORK = PublishedNetwork(vocab_size=515, seed=4)
ADDRESS = "hf://someone/MyGPT"


@pytest.fixture
def published(tiny_data: Path, tmp_path: Path) -> Path:
    """The model in three files and an index, its code and a pickle."""
    folder = NETWORK.save(tmp_path / "theirs", files=3)
    chat_tokenizer(tiny_data / "tokenizer.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[FakeModelHub]:
    with running_model_hub() as found:
        found.commit("someone/MyGPT", {path.name: path.read_bytes() for path in published.iterdir()})
        yield found


def greedy(prompt: list[int], count: int) -> list[int]:
    """The likeliest next tokens by NETWORK's own forward pass."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(NETWORK.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_every_job_takes_it(
    hub: FakeModelHub, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    data = open_folder(tmp_path / "data")
    data.make()
    train, val = (f"{tiny_data}/{split}_*.bin" for split in ("train", "val"))
    ShardImport(ImportShardsConfig(train=train, val=val, output="data", tokenizer=ADDRESS)).run(data)
    settings = EvaluateConfig(checkpoint=ADDRESS, data="data", device="cpu", val_tokens=500)
    scores = evaluate_job.evaluate(settings)

    tokenizer = Tokenizer.from_file(tmp_path / "theirs" / "tokenizer.json")
    config = GenerateConfig(checkpoint=ADDRESS, prompt="import os", max_new_tokens=12, temperature=0, device="cpu")
    text = "".join(chunk.text for chunk in generate_texts(config))
    assert text == tokenizer.decode(greedy(tokenizer.encode("import os"), 12))
    export(ExportConfig(checkpoint=ADDRESS, output="llama"))
    again = evaluate_job.evaluate(dataclasses.replace(settings, checkpoint="llama"))
    assert again.val_loss == scores.val_loss
    assert not [request for request in hub.requests if request.endswith((".py", ".bin"))], "only data is fetched"


def test_training_goes_on_from_it(hub: FakeModelHub, published: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = open_folder(tmp_path / "data")
    data.make()
    train, val = (f"{tiny_data}/{split}_*.bin" for split in ("train", "val"))
    ShardImport(
        ImportShardsConfig(train=train, val=val, output="data", tokenizer=str(published / "tokenizer.json"))
    ).run(data)
    shape = {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 64, "context_length": 64, "theta": 5000}
    size = {"tokens_per_step": 512, "batch_size": 4, "train_steps": 2, "val_tokens": 500, "sample_tokens": 4}
    values = shape | size | {"num_workers": 1, "device": "cpu", "data": "data", "output": "run", "checkpoint": ADDRESS}
    flags = [f"--{name}={value}" for name, value in values.items()]
    result = job("pretrain.py", *flags, hub=hub.url, home=tmp_path, token=None)
    assert result.returncode == 0, result.stderr
    said = "context_length 64 instead of 128, theta 5,000.0 instead of 10,000.0"
    assert said in result.stdout + result.stderr
    description = json.loads((tmp_path / "run/checkpoints/step-000002/checkpoint.json").read_text())
    assert (description["model"]["context_length"], description["model"]["theta"]) == (64, 5000.0)


def test_it_is_served(published: Path) -> None:
    tokenizer = Tokenizer.from_file(published / "tokenizer.json")
    with running(published) as server:
        answer = server.complete(prompt="import os", max_tokens=12, temperature=0)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(tokenizer.encode("import os"), 12))
