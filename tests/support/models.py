"""A small trained model for the tests of what leaves the house, and its twin in transformers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.pretrained.resolve import read_tokenizer
from pipeline.pretrained.weights import read_model_config
from pipeline.storage.folders import open_folder
from pipeline.training.trainer import Trainer
from tests.support.conversations import conversations, pack_here, recipe_of, write_lines
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker

# One thread: what torch's threads wait for each other takes longer than a model of this size.
os.environ.setdefault("LOCAL_WORLD_SIZE", str(os.cpu_count() or 1))
ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


def run_config(**changes: object) -> PretrainConfig:
    """Settings of a run of some steps that takes seconds."""
    settings: dict[str, Any] = {
        "d_ff": 96,
        "context_length": 128,
        "tokens_per_step": 1024,
        "batch_size": 8,
        "train_steps": 40,
        "lr": 1e-2,
        "log_every": 10,
        "val_every": 20,
        "val_tokens": 500,
        "sample_tokens": 4,
    }
    return tiny_config(**(settings | changes))


def train(data: Path, output: Path, **changes: object) -> Path:
    """A run of some steps on one rank and without Ray; returns its newest checkpoint."""
    config = run_config(**changes)
    Trainer(config, data=open_folder(data), output=output, workers=ALONE, tracker=MemoryTracker()).run()
    return output / "checkpoints" / f"step-{config.train_steps:06d}"


ANSWER = "no more"
"""What a model of ``train_chat`` learned to say to everything."""


def train_chat(base: Path, folder: Path, *, chat_template: str = "chatml") -> Path:
    """A checkpoint fine-tuned from one of ``train`` on conversations whose answers are all ANSWER."""
    records = conversations(150, words=5)
    for message in itertools.chain.from_iterable(records):
        if message["role"] == "assistant":
            message["content"] = ANSWER
    length = read_model_config(base).context_length
    source = write_lines(folder / "chats.jsonl", records)
    settings = {"chat_template": chat_template, "context_length": length, "output": str(folder / "data")}
    pack_here(recipe_of(source, read_tokenizer(base), **settings), folder / "data")
    settings = {"checkpoint": str(base), "context_length": length, "tokens_per_step": 8 * length, "val_every": 0}
    return train(folder / "data", folder / "run", **settings, train_steps=60)
