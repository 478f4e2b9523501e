"""Damages copies of the project's files and reads them, for so many seconds: ``fuzz_process.py FOLDER SECONDS SEED``.

A process of its own, so that the memory that it takes is that of reading. It prints, as JSON, how many files were read
in what way, the most memory and the slowest read; anything but a value or a UserError ends it, with what was read kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.transformer import Transformer
from pipeline.checkpoints import metadata as checkpoint_metadata
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.config.command_line import load_preset
from pipeline.config.inference import ExportConfig
from pipeline.config.training import PretrainConfig
from pipeline.dataset.dataset import open_data
from pipeline.dataset.shards import open_split
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_job import Scores
from pipeline.evaluation.hellaswag import read_questions
from pipeline.generation.generate_job import read_prompts
from pipeline.preprocessing import resume_state
from pipeline.pretrained import model_card, weights
from pipeline.pretrained.export_job import export
from pipeline.run_files import SCORES_FILE, SUMMARY_FILE
from pipeline.storage.folders import open_folder
from pipeline.storage.json_files import read_json
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking import report
from pipeline.tracking.journal import Journal, count_waiting, read_journal
from pipeline.tracking.mlflow_run import recorded_run_id
from pipeline.tracking.run_history import RunHistory
from pipeline.training import largest_batch, run_folder
from tests.support import fuzz_chat_and_tasks

OLD = Path(__file__).resolve().parents[1] / "old_files/e56b0f4"
NUMBERS = (0, -1, 1, 10**9, 10**30, -(10**30), 2**31, 2**63, 1e308, float("inf"), float("nan"), 0.5, True)
WORDS = ("", "x" * 3000, "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "\ud83d", "s3://k:v@b/c", "żółw")


class Folders:
    """Copies of every kind of file, made once; ``run/checkpoints/step-000030`` and so on."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("finished_run", "unfinished_shards", "shards", "tokenizer"):
            shutil.copytree(OLD / name, base / name)
        self.checkpoint = base / "finished_run/checkpoints/step-000030"
        export(ExportConfig(checkpoint=str(self.checkpoint), output=str(base / "export"), max_file_bytes=40_000))
        (base / "questions.jsonl").write_text(
            json.dumps({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"] * 4, "label": "1"}) + "\n"
        )
        (base / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
        (base / "preset.yaml").write_text("pretrain:\n  data: x\n  lr: 1e-3\n  train_steps: 7\n")
        run = base / "finished_run"
        (run / "evaluation.json").write_text(json.dumps({"checkpoint": "x", "val_loss": 1.0, "val_tokens": 5}))
        (run / "batch_size.json").write_text(json.dumps([{"batch_size": 4, "found_for": {"workers": 1}}]))
        fuzz_chat_and_tasks.add_files(base)
        self.state = {f"model.{name}": p for name, p in self.load(self.checkpoint).items()}
        self.tokens = self.train_tokens()

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        model = Transformer(weights.read_model_config(path))
        weights.load_weights(path, model)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def train_tokens(self) -> np.ndarray:
        _, manifest = open_data(open_folder(self.base / "shards"))
        stream = open_split(self.base / "shards", "train")
        tokens = stream.read(0, len(stream))
        assert int(tokens.max(initial=0)) < manifest.vocab_size
        return tokens


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(folders: Folders) -> None:
    """The weights are those that were written, unless the description itself was signed anew."""
    checkpoint_reader.newest_info(folders.checkpoint.parent)
    checkpoint_reader.read_info(folders.checkpoint)
    folders.load(folders.checkpoint)


def read_shards(folders: Folders) -> None:
    problems = verify(folders.base / "shards")
    tokens = folders.train_tokens()
    assert problems or np.array_equal(tokens, folders.tokens) or len(tokens) != len(folders.tokens)


def read_run(folders: Folders) -> None:
    folder = open_folder(folders.base / "finished_run")
    RunHistory.from_journal(read_journal(folder))
    count_waiting(folder, "b1ef5c457fb84b79add303b09e1e8905")
    Journal(folder).close()
    report.write_pages(folder, list(read_journal(folder))[-3:])
    card = model_card.Run(
        info=checkpoint_reader.read_info(folders.checkpoint), scores=model_card._read_scores(folder, "x")
    )
    assert card.info is not None
    model_card._tables(card, card.info)
    largest_batch._known_size(folder, {"workers": 1})
    recorded_run_id(folder)
    run_folder.read_best(folder)
    read_json(folder, SUMMARY_FILE, run_folder.RunSummary, mend="x")
    read_json(folder, SCORES_FILE, Scores, mend="x")


def read_items(folders: Folders) -> None:
    folder = open_folder(folders.base / "unfinished_shards")
    resume_state.read_item_records(folder, 0, "x", 300)
    resume_state.read_run(folder)
    resume_state.read_plan(folder)


def read_export(folders: Folders) -> None:
    weights.read_progress(folders.base / "export")
    folders.load(folders.base / "export")


def _in_base(read: Callable[[Path], object], folders: Folders) -> object:
    return read(folders.base)


TARGETS: dict[str, Callable[[Folders], object]] = {
    "finished_run/checkpoints/step-000030/checkpoint.json": read_checkpoint,
    "finished_run/checkpoints/step-000030/shard-00001-model-00001-of-00001.safetensors": read_checkpoint,
    "shards/manifest.json": read_shards,
    "shards/train_000001.bin": read_shards,
    "shards/tokenizer.json": lambda folders: open_data(open_folder(folders.base / "shards")),
    "tokenizer/tokenizer.json": lambda folders: Tokenizer.from_file(folders.base / "tokenizer/tokenizer.json"),
    "finished_run/tracking.jsonl": read_run,
    "finished_run/tracking_sent.json": read_run,
    "finished_run/mlflow_run.json": read_run,
    "finished_run/best.json": read_run,
    "finished_run/summary.json": read_run,
    "finished_run/evaluation.json": read_run,
    "finished_run/batch_size.json": read_run,
    "unfinished_shards/items/run.json": read_items,
    "unfinished_shards/items/plan.jsonl": read_items,
    "unfinished_shards/items/000000.json": read_items,
    "export/config.json": read_export,
    "export/gpt25.json": read_export,
    "export/model.safetensors.index.json": read_export,
    "export/model-00001-of-00002.safetensors": read_export,
    "export/tokenizer.json": lambda folders: weights.read_model_config(folders.base / "export"),
    "questions.jsonl": lambda folders: read_questions(folders.base / "questions.jsonl"),
    "prompts.jsonl": lambda folders: read_prompts(str(folders.base / "prompts.jsonl")),
    "preset.yaml": lambda folders: load_preset(folders.base / "preset.yaml", "pretrain", PretrainConfig),
    **{name: functools.partial(_in_base, read) for name, read in fuzz_chat_and_tasks.READERS.items()},
}


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, choose: random.Random) -> bytes:
    """The content with some bits, a part or a value of its JSON changed."""
    kind = choose.choice(("bits", "cut", "insert", "number", "json", "json", "json", "deep"))
    if kind == "json":
        return damaged_json(content, choose)
    changed = bytearray(content)
    place = choose.randrange(len(changed) + 1)
    if kind == "bits":
        for _ in range(choose.randrange(1, 9)):
            changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del changed[place : choose.choice((len(changed), place + choose.randrange(1, 60)))]
    elif kind == "insert":
        changed[place:place] = choose.randbytes(choose.randrange(1, 40))
    elif kind == "number":
        digits = [index for index, byte in enumerate(changed) if 48 <= byte < 58] or [0]
        changed[choose.choice(digits)] = 0
        changed = changed.replace(b"\0", str(choose.choice(NUMBERS)).encode(), 1)
    else:
        changed[place:place] = choose.choice((b"[", b'{"a":')) * choose.choice((50, 1000, 100_000))
    return bytes(changed)


def damaged_json(content: bytes, choose: random.Random) -> bytes:
    """One value, of one line where there are several, is replaced, removed, or added."""
    lines = content.split(b"\n") if content.count(b"\n{") > 3 else [content]
    number = choose.randrange(len(lines))
    try:
        values = json.loads(lines[number])
    except ValueError:
        return content[: choose.randrange(len(content) + 1)]
    values = replaced(values, choose)
    if isinstance(values, dict) and "format_version" in values and choose.random() < 0.8:
        values.pop("sha256", None)
        values["sha256"] = checkpoint_metadata._checksum(values)
    lines[number] = json.dumps(values).encode()
    return b"\n".join(lines)


def replaced(values: Any, choose: random.Random) -> Any:
    if isinstance(values, dict | list) and values and choose.random() < 0.85:
        key = choose.choice(list(values)) if isinstance(values, dict) else choose.randrange(len(values))
        if choose.random() < 0.15:
            del values[key]
        else:
            values[key] = replaced(values[key], choose)
        return values
    pool: tuple[Any, ...] = (
        None,
        [],
        {},
        [[]],
        {"": None},
        [1] * 2000,
        json.loads("[" * 300 + "]" * 300),
        *NUMBERS,
        *WORDS,
    )
    return choose.choice(pool)


def signed(folders: Folders, path: Path) -> None:
    """Put the checksum of a changed file into the description beside it, so that its content is looked at."""
    if path.suffix == ".safetensors" and path.parent == folders.checkpoint:
        description = path.parent / "checkpoint.json"
        values = json.loads(description.read_text())
        values.pop("sha256")
        values["files"][path.name] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        values["sha256"] = checkpoint_metadata._checksum(values)
        description.write_text(json.dumps(values))


@dataclasses.dataclass
class Result:
    """What is printed."""

    read: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest_seconds: float = 0.0
    slowest: str = ""
    longest_message: int = 0
    peak_bytes: int = 0


def main(base: Path, seconds: float, seed: int) -> None:
    """Fuzz until the time is over, each kind of file in turn."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    folders, choose, result = Folders(base), random.Random(seed), Result()
    sound = {name: (base / name).read_bytes() for name in TARGETS}
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end or number < 2 * len(TARGETS):
        name = list(TARGETS)[number % len(TARGETS)]
        number += 1
        content = damaged(sound[name], choose)
        (base / name).write_bytes(content)
        if choose.random() < 0.7:
            signed(folders, base / name)
        (base.parent / "last").write_bytes(content)
        (base.parent / "last_name").write_text(f"{name} number {number} of seed {seed}")
        began = time.monotonic()
        try:
            TARGETS[name](folders)
            result.read[name] += 1
        except UserError as error:
            result.refused[name] += 1
            result.longest_message = max(result.longest_message, len(str(error)))
        if (took := time.monotonic() - began) > result.slowest_seconds:
            result.slowest_seconds, result.slowest = took, name
        for other, before in sound.items():
            if other == name or other.endswith("checkpoint.json") or other.startswith("finished_run/"):
                (base / other).write_bytes(before)
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result.peak_bytes = int(status["VmHWM"].split()[0]) * 1024
    sys.stdout.write(json.dumps(vars(result)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
