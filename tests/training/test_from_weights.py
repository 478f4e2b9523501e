"""A run that starts from the weights of another model: the same bits, a context and a theta of its own, what fits."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.checkpoints.reader import read_info
from pipeline.config.data import ImportShardsConfig
from pipeline.config.inference import EvaluateConfig
from pipeline.config.training import PretrainConfig
from pipeline.dataset.shards import open_split
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job
from pipeline.preprocessing.import_job import ShardImport
from pipeline.storage.folders import open_folder
from pipeline.training.run_folder import RunSummary
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.llama_twin import llama_twin
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE, train
from tests.support.published_network import PublishedNetwork, chat_tokenizer

CONFIG = tiny_config(tokens_per_step=64 * 8, train_steps=4, val_every=4, sample_every=4, lr=1e-2)
NETWORK = PublishedNetwork(vocab_size=515)


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with the shape of CONFIG."""
    return train(tiny_data, tmp_path_factory.mktemp("first"), d_ff=64, context_length=32)


@pytest.fixture(scope="module")
def chat_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of tiny_data, imported with a tokenizer that has three special tokens more."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(tiny_data / "tokenizer.json", folder)
    train, val = (str(tiny_data / f"{split}_*.bin") for split in ("train", "val"))
    config = ImportShardsConfig(train=train, val=val, output=str(folder / "data"), tokenizer=str(tokenizer))
    output = open_folder(folder / "data")
    output.make()
    ShardImport(config).run(output)
    return folder / "data"


@pytest.fixture(scope="module")
def published(chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = NETWORK.save(tmp_path_factory.mktemp("published"))
    (folder / "tokenizer.json").write_bytes((chat_data / "tokenizer.json").read_bytes())
    return folder


def trainer_of(config: PretrainConfig, data: Path, output: Path) -> Trainer:
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=MemoryTracker())


def run(trainer: Trainer) -> tuple[RunSummary, MemoryTracker]:
    summary = trainer.run()
    assert isinstance(trainer.tracker, MemoryTracker)
    return summary, trainer.tracker


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def from_weights(checkpoint: Path, **changes: Any) -> PretrainConfig:
    return dataclasses.replace(CONFIG, checkpoint=str(checkpoint), **changes)


def test_the_same_settings_give_the_bits_of_weights_put_in_by_hand(
    checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    by_hand = trainer_of(CONFIG, tiny_data, tmp_path / "hand")
    saved = tensors(checkpoint)
    with torch.no_grad():
        for name, parameter in by_hand.model.named_parameters():
            parameter.copy_(saved[f"model.{name}"])
    expected, expected_tracker = run(by_hand)
    found, tracker = run(trainer_of(from_weights(checkpoint), tiny_data, tmp_path / "found"))
    assert tracker.metrics["train/loss"] == expected_tracker.metrics["train/loss"]
    assert found.val_loss == expected.val_loss
    ours, theirs = tensors(Path(found.checkpoint)), tensors(Path(expected.checkpoint))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("change", [{"context_length": 64}, {"context_length": 16}, {"theta": 500.0}])
def test_context_and_theta_may_change(
    checkpoint: Path, tiny_data: Path, tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.training.trainer"):
        trainer = trainer_of(from_weights(checkpoint, **change), tiny_data, tmp_path / "run")
    saved = tensors(checkpoint)
    assert all(torch.equal(weight, saved[f"model.{name}"]) for name, weight in trainer.model.named_parameters())
    ((name, value),) = change.items()
    assert getattr(trainer.model.config, name) == value
    assert f"with {name} {value:,} instead of {getattr(CONFIG, name):,}" in caplog.text
    tokens = torch.arange(trainer.model.config.context_length)[None]
    with torch.no_grad():
        difference = trainer.model(tokens) - llama_twin(trainer.model)(tokens).logits
    assert difference.abs().max() < 1e-4
    summary, tracker = run(trainer)
    info = read_info(Path(summary.checkpoint))
    assert info.model[name] == info.config[name] == tracker.params[name] == value
    unchanged = trainer_of(from_weights(checkpoint), tiny_data, tmp_path / "other")
    assert info.model == unchanged.model.config.to_dict() | change
    resumed = trainer_of(from_weights(checkpoint, **change), tiny_data, tmp_path / "run")
    assert resumed.start_step == CONFIG.train_steps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 4}, "num_heads 2, but this run asks for 4; use the same num_heads"),
        ({"num_layers": 3}, "num_layers 2, but this run asks for 3"),
        ({"d_model": 48}, "d_model 32, but this run asks for 48"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05, but this run asks for 1e-06"),
        ({"tie_embeddings": False, "theta": 7.0}, "tie_embeddings True, but this run asks for False"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    checkpoint: Path, tiny_data: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        trainer_of(from_weights(checkpoint, **change), tiny_data, tmp_path)


def test_data_of_another_tokenizer_is_one_sentence(
    checkpoint: Path, published: Path, tiny_data: Path, chat_data: Path, tmp_path: Path
) -> None:
    advice = r"make the data with --tokenizer .*/tokenizer\.json, or start without --checkpoint"
    with pytest.raises(UserError, match=f"a model of 515 ids, but the tokenizer of --data has 512; {advice}"):
        trainer_of(from_weights(published), tiny_data, tmp_path)
    with pytest.raises(UserError, match=f"a model of 512 ids, but the tokenizer of --data has 515; {advice}"):
        trainer_of(from_weights(checkpoint), chat_data, tmp_path)
    other = NETWORK.save(tmp_path / "other")
    text = (published / "tokenizer.json").read_text().replace("<|user|>", "<|human|>")
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=f"know the ids of another tokenizer than that of --data; {advice}"):
        trainer_of(from_weights(other), chat_data, tmp_path)


@torch.no_grad()
def loss_by_another_hand(data: Path, num_tokens: int, length: int) -> float:
    """Mean loss of NETWORK's own forward pass over windows of ``length`` tokens from the start of the val set."""
    tokens = torch.from_numpy(open_split(open_folder(data), "val").read(0, num_tokens + 1).astype("int64"))
    losses = []
    for start in range(0, num_tokens, length):
        window = tokens[start : start + length + 1]
        losses.append(F.cross_entropy(NETWORK.logits(window[None, :-1])[0], window[1:], reduction="sum").item())
    return sum(losses) / num_tokens


def test_the_published_model_is_evaluated_and_trained_further(published: Path, chat_data: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(checkpoint=str(published), data=str(chat_data), val_tokens=1000, batch_size=3, device="cpu")
    scores = evaluate_job.evaluate(config)
    assert scores.val_tokens == 1000
    assert scores.val_loss == pytest.approx(loss_by_another_hand(chat_data, 1000, NETWORK.context_length), rel=1e-5)

    settings = {"val_tokens": 1000, "train_steps": 1}
    still, _ = run(trainer_of(from_weights(published, lr=0.0, **settings), chat_data, tmp_path / "still"))
    assert still.val_loss == pytest.approx(loss_by_another_hand(chat_data, 1000, CONFIG.context_length), rel=1e-5)
    tuned, _ = run(trainer_of(from_weights(published, **settings | {"train_steps": 20}), chat_data, tmp_path / "tuned"))
    assert tuned.val_loss is not None and still.val_loss is not None
    assert tuned.val_loss < still.val_loss - 0.1
