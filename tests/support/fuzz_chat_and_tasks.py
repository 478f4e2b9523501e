"""The files of conversations, chats and tasks, for fuzz_process.py: one of each kind, and how the project reads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.tasks import TaskSettings
from pipeline.conversations.templates import CHATML, TEMPLATE_FILE, with_chat_tokens
from pipeline.dataset.dataset import open_data
from pipeline.dataset.shards import open_split
from pipeline.dataset.verification import verify
from pipeline.decontamination.evaluation_sets import EvaluationSets
from pipeline.pretrained import model_card
from pipeline.pretrained.chat import known_chat, read_chat
from pipeline.pretrained.resolve import ModelSource
from pipeline.storage.folders import open_folder
from pipeline.tasks.catalog import core_result, read_tasks
from pipeline.tasks.harness import TASKS
from pipeline.tasks.questions import store_tasks, stored_tasks
from pipeline.tasks.results import TaskResult, all_figures
from pipeline.tasks.scoring import KeptResult, KeptScores, read_kept
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.conversations import conversations, pack_here, recipe_of, write_lines
from tests.support.task_files import harness_rows, write_bundle, write_harness

RESULT = TaskResult(questions=12, num_fewshot=2, acc=0.5, acc_stderr=0.1, bits_per_byte=1.5, bits_per_byte_stderr=0.1)


def add_files(base: Path) -> None:
    """Make a sound file of every kind in READERS; ``base`` has an export of a model that does not chat."""
    bundle = write_bundle(base / "bundle", count=5)
    with zipfile.ZipFile(base / "bundle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(bundle.rglob("*.*")):
            archive.write(path, path.relative_to(bundle))
    write_harness(base / "harness", sorted(TASKS), 3)
    (base / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(harness_rows("openbookqa", 3)), base / "parquet/openbookqa.parquet")
    scores = KeptScores(model="m", results={"core/words": KeptResult(task="t", result=RESULT)})
    (base / "task_scores.json").write_text(json.dumps(dataclasses.asdict(scores)))
    store_tasks(read_tasks(TaskSettings(tasks="core", task_files=str(bundle))), open_folder(base), "tasks.json")
    _add_chats(base)
    _add_scores(base / "finished_run/evaluation.json")


def _add_chats(base: Path) -> None:
    plain = Tokenizer.from_file(base / "export/tokenizer.json")
    for name in ("chat", "inline"):
        (base / name).mkdir()
        with_chat_tokens(plain, CHATML.name).save(base / name / "tokenizer.json")
        shutil.copyfile(base / "export/config.json", base / name / "config.json")
    (base / "chat" / TEMPLATE_FILE).write_text(CHATML.jinja)
    (base / "chat/README.md").write_text("# A model of others\n")
    (base / "inline/tokenizer_config.json").write_text(json.dumps({"eos_token": "x", "chat_template": CHATML.jinja}))
    records = conversations(12, words=4)
    write_lines(base / "chats.jsonl", records)
    pq.write_table(pa.table({"messages": records}), base / "chats.parquet")
    pack_here(recipe_of(base / "chats.jsonl", plain), base / "packed")


def _add_scores(path: Path) -> None:
    tasks = {"hellaswag": dataclasses.asdict(RESULT)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": tasks, "core": 0.1, "core_stderr": 0.01}))


def _read_bundle(base: Path) -> None:
    read_tasks(TaskSettings(tasks="core", task_files=str(base / "bundle")))
    EvaluationSets.read([f"tasks:core@{base / 'bundle'}"])


def _read_zip(base: Path) -> None:
    read_tasks(TaskSettings(tasks="core", task_files=str(base / "bundle.zip")))


def _read_harness(name: str, folder: str = "harness", suffix: str = "jsonl") -> Callable[[Path], None]:
    def read(base: Path) -> None:
        EvaluationSets.read([str(base / folder / f"{name}.{suffix}")])
        read_tasks(TaskSettings(tasks=name, task_files=str(base / folder)))

    return read


def _read_scores(base: Path) -> None:
    kept = {name: each.result for name, each in read_kept(open_folder(base), "task_scores.json", "m").results.items()}
    all_figures(kept)
    core_result("core", kept)


def _read_chat(folder: str) -> Callable[[Path], None]:
    def read(base: Path) -> None:
        path = base / folder
        tokenizer = Tokenizer.from_file(path / "tokenizer.json")
        known_chat(path, tokenizer)
        if (chat := read_chat(path, tokenizer)) is not None:
            chat.render([{"role": "user", "content": "x"}], add_generation_prompt=True)

    return read


def _read_card(base: Path) -> None:
    model_card.read_run(ModelSource(path=base / "chat", address="x", run_folder=None))


def _pack(name: str) -> Callable[[Path], None]:
    def read(base: Path) -> None:
        shutil.rmtree(base / "made", ignore_errors=True)
        plain = Tokenizer.from_file(base / "export/tokenizer.json")
        pack_here(recipe_of(base / name, plain), base / "made")

    return read


def _read_packed(base: Path) -> None:
    problems = verify(base / "packed")
    open_data(open_folder(base / "packed"))
    stream = open_split(base / "packed", "train")
    assert problems or stream.read(0, len(stream)).size


READERS: dict[str, Callable[[Path], object]] = {
    "bundle/core.yaml": _read_bundle,
    "bundle/eval_meta_data.csv": _read_bundle,
    "bundle/eval_data/some/choices.jsonl": _read_bundle,
    "bundle/eval_data/some/blanks.jsonl": _read_bundle,
    "bundle/eval_data/some/words.jsonl": _read_bundle,
    "bundle.zip": _read_zip,
    **{f"harness/{name}.jsonl": _read_harness(name) for name in sorted(TASKS)},
    "parquet/openbookqa.parquet": _read_harness("openbookqa", "parquet", "parquet"),
    "task_scores.json": _read_scores,
    "tasks.json": lambda base: stored_tasks(open_folder(base), "tasks.json"),
    "chat/chat_template.jinja": _read_chat("chat"),
    "chat/README.md": _read_card,
    "inline/tokenizer_config.json": _read_chat("inline"),
    "chats.jsonl": _pack("chats.jsonl"),
    "chats.parquet": _pack("chats.parquet"),
    "packed/manifest.json": _read_packed,
    "packed/train_flags_000000.bin": _read_packed,
}
