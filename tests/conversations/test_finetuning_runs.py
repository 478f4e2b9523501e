"""Training on packed conversations: the loss of a step whatever the number of ranks, exact resume, held-out figures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.transformer import Transformer
from pipeline.checkpoints.reader import read_info
from pipeline.config.training import PretrainConfig
from pipeline.dataset.batches import BatchOrder, micro_batches
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import PackedStream, open_split
from pipeline.errors import UserError
from pipeline.pretrained import weights
from pipeline.pretrained.resolve import open_model
from pipeline.training.run_folder import RunSummary
from pipeline.training.trainer import Trainer
from tests.conversations.test_templates import by_hand
from tests.support.conversations import conversations, pack_here, recipe_of, write_lines
from tests.support.factories import tiny_config
from tests.support.llama_twin import ROUNDING, grad_of, lively_model, llama_twin, relative_error, small_config
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE, train
from tests.support.ranks import run_ranks
from tests.training.test_trainer import checkpoint_tensors, windows_fed

STEPS, LENGTH = 8, 65
CONVERSATIONS = conversations(150, words=5)


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of 512 ids, all rows of whose embedding are taken."""
    return train(tiny_data, tmp_path_factory.mktemp("base"), context_length=64, train_steps=20, val_every=0)


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.pretrained.resolve import read_tokenizer

    folder = tmp_path_factory.mktemp("chat")
    source = write_lines(folder / "chats.jsonl", CONVERSATIONS)
    pack_here(recipe_of(source, read_tokenizer(base), output=str(folder / "data"), item_bytes=8000), folder / "data")
    return folder / "data"


@pytest.fixture
def config(base: Path) -> PretrainConfig:
    return tiny_config(
        checkpoint=str(base),
        d_ff=96,
        context_length=64,
        tokens_per_step=64 * 12,
        train_steps=STEPS,
        lr=3e-3,
        val_every=4,
        val_tokens=10_000,
        sample_every=4,
        checkpoint_every=3,
    )


def train_here(config: PretrainConfig, data: Path, output: Path) -> tuple[RunSummary, MemoryTracker]:
    tracker = MemoryTracker()
    return Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker).run(), tracker


def train_ranks(
    config: PretrainConfig, data: Path, output: Path, world_size: int, *, stop_after: int | None = None
) -> dict[str, Any]:
    """Run trainer_process.py on several ranks; returns start step, losses as exact numbers, and the windows."""
    history, settings = output.with_suffix(".history"), output.with_suffix(".json")
    values = dataclasses.asdict(dataclasses.replace(config, output=str(output)))
    settings.write_text(
        json.dumps({"config": values, "data": [str(data)], "stop_after": stop_after, "history": str(history)})
    )
    result = run_ranks("trainer_process.py", settings, world_size=world_size)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(history.read_text())
    found["windows"] = windows_fed(history, world_size)
    found["losses"] = {int(step): float.fromhex(loss) for step, loss in found["losses"].items()}
    return found


def packed_stream(data: Path, split: str) -> PackedStream:
    stream = open_split(data, split)
    assert isinstance(stream, PackedStream)
    return stream


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_loss_and_gradient_are_the_mean_over_the_tokens_that_count(data: Path, world_size: int) -> None:
    """The ranks' gradients, averaged, are torch's of one mean over all learned tokens of the step."""
    stream, manifest = packed_stream(data, "train"), Manifest.load(data)
    order = BatchOrder(num_windows=len(stream) // LENGTH, windows_per_step=7, batch_size=2, seed=3)
    shape = small_config(vocab_size=manifest.vocab_size, context_length=64)
    ours, theirs = lively_model(shape), lively_model(shape)
    total = 0.0
    for rank in range(world_size):
        place: dict[str, Any] = {"context_length": 64, "rank": rank, "world_size": world_size}
        for batch in micro_batches(stream, order, step=2, device=torch.device("cpu"), **place):
            share = ours(batch.inputs, batch.targets, documents=batch.documents) * batch.weight / world_size
            share.backward()
            total += share.item()
    losses, counts = [], []
    for window in order.step_windows(2):
        ids, flags = (each.read(int(window) * LENGTH, LENGTH).astype(np.int64) for each in (stream, stream.flags))
        starts = [*np.flatnonzero(flags == 2).tolist(), LENGTH]
        counts.append(int((flags == 1).sum()))
        for start, stop in itertools.pairwise(starts):
            tokens, learned = torch.from_numpy(ids[start:stop])[None], torch.from_numpy(flags[start + 1 : stop] == 1)
            losses.append(F.cross_entropy(theirs(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")[learned].sum())
    expected = torch.stack(losses).sum() / sum(counts)
    expected.backward()
    assert len(set(counts)) > 2, "windows differ in what counts"
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(grad_of(mine), grad_of(other)) < ROUNDING


def test_ranks_give_the_curve_of_one_and_resume_bit_for_bit(config: PretrainConfig, data: Path, tmp_path: Path) -> None:
    _, tracker = train_here(config, data, tmp_path / "one")
    alone = [loss for _, loss in tracker.metrics["train/loss"]]
    clean = train_ranks(config, data, tmp_path / "clean", 4)
    assert list(clean["losses"].values()) == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0] - 0.1

    assert train_ranks(config, data, tmp_path / "broken", 4, stop_after=5)["start_step"] == 0
    shutil.copytree(tmp_path / "broken", tmp_path / "fewer")
    resumed = train_ranks(config, data, tmp_path / "broken", 4)
    assert resumed["start_step"] == 3
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if step > 3}
    expected, found = (checkpoint_tensors(tmp_path / name, STEPS) for name in ("clean", "broken"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    fewer = train_ranks(config, data, tmp_path / "fewer", 2)
    assert fewer["start_step"] == 3
    assert fewer["windows"] == clean["windows"][3 * 12 :]
    later = {step: loss for step, loss in clean["losses"].items() if step > 3}
    assert fewer["losses"] == pytest.approx(later, rel=1e-4)


def test_figures_on_conversations_held_out_are_those_of_each_alone(
    config: PretrainConfig, data: Path, tmp_path: Path
) -> None:
    summary, tracker = train_here(config, data, tmp_path)
    checkpoint = tmp_path / f"checkpoints/step-{STEPS:06d}"
    pretrained = open_model(checkpoint, torch.device("cpu"))
    twin = llama_twin(pretrained.model)
    wanted = {tuple(ids) for ids, _ in held_out_windows(data)}
    summed, right, count = 0.0, 0, 0
    for messages in CONVERSATIONS:
        ids, learned = by_hand(messages, "chatml", pretrained.tokenizer)
        if tuple(ids) not in wanted:
            continue
        tokens = torch.tensor([ids])
        with torch.no_grad():
            scores = twin(tokens[:, :-1]).logits[0].log_softmax(dim=-1)
        chosen = torch.tensor(learned[1:])
        summed -= scores.gather(1, tokens[0, 1:, None])[:, 0][chosen].sum().item()
        right += int((scores.argmax(dim=-1) == tokens[0, 1:])[chosen].sum())
        count += int(chosen.sum())
    assert count == summary.val_tokens > 100
    assert summary.val_loss == pytest.approx(summed / count, rel=1e-5)
    assert summary.val_accuracy == pytest.approx(right / count)
    assert tracker.metrics["val/token_accuracy"][-1] == (STEPS, summary.val_accuracy)
    assert "val/bits_per_byte" not in tracker.metrics
    assert read_info(checkpoint).chat_template == "chatml"
    assert summary.sample.startswith(config.sample_prompt + "\n\n")
    assert "<|im_end|>" not in summary.sample


def held_out_windows(data: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, flags) of every conversation in the val windows, the last of each without what fills it up."""
    stream = packed_stream(data, "val")
    found = []
    for window in range(len(stream) // LENGTH):
        ids, flags = (each.read(window * LENGTH, LENGTH).tolist() for each in (stream, stream.flags))
        last = max(place for place, flag in enumerate(flags) if flag == 1) + 2  # its end, and the line's
        starts = [place for place, flag in enumerate(flags) if flag == 2]
        found += [(ids[start:stop], flags[start:stop]) for start, stop in zip(starts, [*starts[1:], last], strict=True)]
    return found


def test_new_ids_begin_as_the_mean_of_all_others(
    base: Path, data: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    old = open_model(base, torch.device("cpu")).model
    trainer = Trainer(config, data=data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    rows = trainer.model.embedding.weight.detach()
    assert rows.shape == (576, 32) and old.embedding.weight.shape == (512, 32)
    assert torch.equal(rows[:512], old.embedding.weight)
    mean = old.embedding.weight.detach().double().mean(dim=0).float()
    assert torch.equal(rows[512:514], torch.stack([mean, mean])) and mean.abs().max() > 0
    assert rows[514:].abs().max() == 0
    for name, parameter in trainer.model.named_parameters():
        assert name == "embedding.weight" or torch.equal(parameter, dict(old.named_parameters())[name])


def test_rows_are_added_within_the_padding(tmp_path: Path) -> None:
    """203 ids in 256 rows: the matrix stays as large as it is; an output matrix of its own gets its mean, too."""
    shape = small_config(tie_embeddings=False)
    model, larger = lively_model(shape), Transformer(small_config(tie_embeddings=False, vocab_size=206))
    folder = exported(model, tmp_path)
    weights.load_weights(folder, larger)
    for name in ("embedding.weight", "output.weight"):
        old, new = (dict(each.named_parameters())[name].detach() for each in (model, larger))
        assert new.shape == old.shape and torch.equal(new[:203], old[:203])
        assert relative_error(new[203:206], old[:203].mean(dim=0).expand(3, -1)) < 1e-6
        assert new[206:].abs().max() == 0


def exported(model: Transformer, folder: Path) -> Path:
    """A folder in Hugging Face's format, written by transformers."""
    llama_twin(model).save_pretrained(folder)
    return folder


def test_windows_of_another_length_are_a_sentence(config: PretrainConfig, data: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(config, context_length=32, tokens_per_step=32 * 12)
    with pytest.raises(UserError, match="in windows of context_length 64, but the settings say 32"):
        Trainer(other, data=data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())


def test_weights_of_another_tokenizer_are_a_sentence(
    config: PretrainConfig, base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from pipeline.tokenizer.bpe import Tokenizer

    source = write_lines(tmp_path / "chats.jsonl", CONVERSATIONS)
    other = Tokenizer.from_file(tiny_data / "tokenizer.json").with_special_tokens(["<|other|>"])
    pack_here(recipe_of(source, other, output=str(tmp_path / "data")), tmp_path / "data")
    with pytest.raises(UserError, match="holds a model of 512 ids, but the tokenizer of --data has 515"):
        Trainer(config, data=tmp_path / "data", output=tmp_path / "run", workers=ALONE, tracker=MemoryTracker())
