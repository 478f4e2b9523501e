"""jobs/finetune.py as a user has it: packs, trains, goes on, chats; mistakes are one sentence."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.finetuning import FinetuneConfig
from pipeline.config.inference import GenerateConfig
from pipeline.errors import UserError
from pipeline.generation.generate_job import Generator
from pipeline.pretrained import weights
from pipeline.pretrained.chat import read_chat
from pipeline.pretrained.resolve import read_tokenizer
from tests.jobs.test_jobs import ROOT, error_of, job
from tests.support.conversations import conversations, write_lines
from tests.support.models import train

BAD = [{"role": "assistant", "content": "x"}]


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("base"), context_length=64, train_steps=5, val_every=0)


@pytest.mark.slow
def test_from_conversations_to_a_chat(base: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "chats.jsonl", [*conversations(120, words=5), BAD])
    flags = ["--checkpoint", str(base), "--source", "chats.jsonl", "--data", "data", "--output", "run"]
    flags += ["--chat_template", "gpt2.5", "--device", "cpu", "--batch_size", "4", "--epochs", "1", "--lr", "1e-3"]
    flags += ["--val_fraction", "0.2", "--sample_tokens", "4", "--val_every", "5"]
    first = job("finetune.py", *flags, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "finetune: done" in first.stdout and "accuracy" in first.stdout
    assert "line 121 of chats.jsonl has messages in the order assistant" in first.stdout
    assert "<|user|> 512, <|assistant|> 513, <|system|> 514, which become more than the 512 rows" in first.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    again = job("finetune.py", *flags, cwd=tmp_path)
    assert again.returncode == 0 and json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert [line for line in again.stdout.splitlines() if "checkpoint" in line] == [
        line for line in first.stdout.splitlines() if "checkpoint" in line
    ]

    checkpoint = Path(summary["checkpoint"])
    chat = read_chat(checkpoint, read_tokenizer(checkpoint))
    assert chat is not None and chat.template.name == "gpt2.5"
    assert weights.read_model_config(checkpoint).vocab_size == 515
    config = GenerateConfig(checkpoint=str(checkpoint), chat=True, max_new_tokens=8, temperature=0, device="cpu")
    messages = [{"role": "user", "content": "fox"}]
    answer = "".join(chunk.text for chunk in Generator(config).answer(messages, seed=1))
    command = [sys.executable, str(ROOT / "jobs/generate.py"), str(checkpoint), "--chat", "--max_new_tokens", "8"]
    typed = subprocess.run(
        [*command, "--temperature", "0", "--device", "cpu"],
        input="fox\n", cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert typed.returncode == 0, typed.stderr
    assert typed.stdout == answer + "\n"


def test_a_model_without_a_template_does_not_chat(base: Path) -> None:
    with pytest.raises(UserError, match="has no chat template; fine-tune it first"):
        Generator(GenerateConfig(checkpoint=str(base), chat=True, device="cpu"))


def test_mistakes_are_one_sentence(base: Path, tmp_path: Path) -> None:
    assert "--source is missing; name the files of conversations" in error_of("finetune.py", cwd=tmp_path)
    flags = ["--checkpoint", str(base), "--source", "none.jsonl", "--data", "data", "--output", "run"]
    assert "source " in error_of("finetune.py", *flags, cwd=tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_steps_follow_from_epochs_and_windows(base: Path) -> None:
    model = weights.read_model_config(base)
    config = FinetuneConfig(source="x", epochs=3, batch_size=8, num_workers=2)
    assert config.training(model, num_windows=100).train_steps == 19  # 300 windows, 16 a step
    assert config.training(model, num_windows=100).tokens_per_step == 16 * 64
    shorter = dataclasses.replace(config, context_length=32, tokens_per_step=32 * 10)
    training = shorter.training(model, num_windows=100)
    assert (training.train_steps, training.context_length, training.d_model) == (30, 32, model.d_model)
