"""jobs/tokenize.py --decontaminate on a real local Ray: what goes and what the list says, behind rules and copies."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.command_line import resolve
from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.errors import UserError
from pipeline.preprocessing import tokenization
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.fixtures import contents
from tests.support.task_files import write_bundle, write_lines

pytestmark = pytest.mark.usefixtures("local_ray")
CHOOSE = random.Random(9)
WORDS = [f"word{number}" for number in range(500)]
QUESTIONS = [" ".join(CHOOSE.choices(WORDS, k=18)) for _ in range(5)]


def _text(number: int, *, planted: int | None = None) -> str:
    around = " ".join(CHOOSE.choices(WORDS, k=60))
    middle = "" if planted is None else QUESTIONS[planted]
    return f"The text {number} of the many. {around} {middle} {around[:50]} number {number}."


TEXTS = [_text(number, planted=number % 5 if number % 7 == 3 else None) for number in range(60)]
NEW = _text(60, planted=0)
DROPPED = [number for number in range(60) if number % 7 == 3]


@pytest.fixture
def config(tmp_path: Path) -> TokenizeConfig:
    """Two files of 30 texts: the first is long enough to be two items, and blank lines and nulls lie between."""
    (tmp_path / "texts").mkdir()
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in TEXTS[30 * part : 30 * part + 30]]
        lines.insert(2, json.dumps({"text": None}))
        (tmp_path / "texts" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"q": text, "id": text[:5]}) + "\n" for text in QUESTIONS))
    bpe_training.train_bpe(TEXTS, 300).save(tmp_path / "tokenizer.json")
    return TokenizeConfig(
        source=str(tmp_path / "texts"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        decontaminate=(str(tmp_path / "tasks.jsonl"),),
        val_fraction=0,
        num_workers=2,
    )


def documents_of(output: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(output / "tokenizer.json")
    stream = open_split(output, "train")
    ids = stream.read(0, len(stream))
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot_id)[1:])]


def listed(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "contaminated.jsonl").read_text().splitlines()]


def test_documents_with_a_question_go_and_are_listed(config: TokenizeConfig, tmp_path: Path) -> None:
    report = tokenization.tokenize(config, open_folder(tmp_path / "out"))
    manifest = Manifest.load(tmp_path / "out")
    assert documents_of(tmp_path / "out") == [text for number, text in enumerate(TEXTS) if number not in DROPPED]
    assert manifest.skipped == report.skipped == {"null": 2, "contaminated": len(DROPPED)}
    assert manifest.settings["evaluation_sets"][0].startswith("tasks.jsonl ")
    lines = listed(tmp_path / "out")
    assert [(line["file"].split(" ")[0], line["document"]) for line in lines] == [
        (f"{number // 30}.jsonl", number % 30 + 1) for number in DROPPED
    ]
    assert [line["question"] for line in lines] == [number % 5 + 1 for number in DROPPED]
    assert all(line["question_id"] == line["words"][:5] for line in lines)
    assert [line["words"] for line in lines] == [QUESTIONS[number % 5] for number in DROPPED]


def test_documents_with_a_question_of_a_task_go_and_are_listed(config: TokenizeConfig, tmp_path: Path) -> None:
    """Its number is that of the line in the file, whatever the order in which the task asks."""
    bundle = write_bundle(tmp_path / "bundle")
    rows = [{"context": text.rpartition(" ")[0], "continuation": text.rpartition(" ")[2]} for text in QUESTIONS]
    write_lines(bundle / "eval_data" / "some" / "words.jsonl", rows)
    chosen = dataclasses.replace(config, decontaminate=(f"tasks:core/words@{bundle}",))
    tokenization.tokenize(chosen, open_folder(tmp_path / "out"))
    assert documents_of(tmp_path / "out") == [text for number, text in enumerate(TEXTS) if number not in DROPPED]
    lines = listed(tmp_path / "out")
    assert [(line["questions"], line["question"]) for line in lines] == [
        ("core/words", number % 5 + 1) for number in DROPPED
    ]
    assert tokenization.finished(chosen, open_folder(tmp_path / "out")) is not None


def test_a_lost_item_is_done_again_with_the_same_list(config: TokenizeConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(
        config, item_bytes=4_000, filters=("gopher",), filter_bounds=("gopher.min_stop_words=1",)
    )
    output = open_folder(tmp_path / "out")
    tokenization.tokenize(small, output)
    before = contents(tmp_path / "out")
    assert len(listed(tmp_path / "out")) == len(DROPPED)
    max((tmp_path / "out").glob("train_*.bin")).unlink()
    (tmp_path / "out" / "items" / "contaminated" / "000000.jsonl").unlink()
    (tmp_path / "out" / "items" / "000000.json").unlink()
    tokenization.tokenize(dataclasses.replace(small, num_workers=1), output)
    assert contents(tmp_path / "out") == before
    assert tokenization.finished(small, output) == Manifest.load(output)
    (tmp_path / "out" / "contaminated.jsonl").unlink()
    assert tokenization.finished(small, output) is None


def test_a_list_that_is_gone_is_a_sentence(config: TokenizeConfig, tmp_path: Path) -> None:
    output = open_folder(tmp_path / "out")
    tokenization.tokenize(config, output)
    before = contents(tmp_path / "out")
    for name in ("manifest.json", "contaminated.jsonl", "items/contaminated/000000.jsonl"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(UserError, match=r"contaminated/000000.jsonl, .* delete items/000000.json beside it"):
        tokenization.tokenize(config, output)
    (tmp_path / "out" / "items" / "000000.json").unlink()
    tokenization.tokenize(config, output)
    assert contents(tmp_path / "out") == before


def test_it_comes_behind_rules_and_copies(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "texts" / "2.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["too short", TEXTS[3], NEW, TEXTS[4], TEXTS[5]])
    )
    chosen = dataclasses.replace(
        config, filters=("gopher",), filter_bounds=("gopher.min_words=10", "gopher.min_stop_words=0"), dedup="exact"
    )
    tokenization.tokenize(chosen, open_folder(tmp_path / "out"))
    assert Manifest.load(tmp_path / "out").skipped == {
        "null": 2,
        "gopher: min_words": 1,
        "duplicate": 3,
        "contaminated": len(DROPPED) + 1,
    }
    last = listed(tmp_path / "out")[-1]
    assert last["file"].startswith("2.jsonl") and last["document"] == 3 and last["question"] == 1


def test_other_questions_are_another_folder(config: TokenizeConfig, tmp_path: Path) -> None:
    output, plain = open_folder(tmp_path / "out"), dataclasses.replace(config, decontaminate=())
    tokenization.tokenize(config, output)
    with pytest.raises(UserError, match=r"another choice of evaluation questions .* give the same --decontaminate to"):
        tokenization.finished(plain, output)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"q": QUESTIONS[0]}))
    with pytest.raises(UserError, match="give the same --decontaminate to"):
        tokenization.tokenize(config, output)
    without = open_folder(tmp_path / "without")
    tokenization.tokenize(plain, without)
    with pytest.raises(UserError, match="give --decontaminate none to go on"):
        tokenization.finished(config, without)


def test_a_preset_with_hellaswag_or_tasks_looks_for_their_questions(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(
        "tokenize: {output: out}\npretrain: {hellaswag: h.jsonl}\nevaluate: {hellaswag: h.jsonl}\n"
    )

    def files(*flags: str) -> tuple[str, ...]:
        given = ["--config", str(tmp_path / "preset.yaml"), *flags]
        return resolve(TokenizeConfig, "tokenize", given, program="job").decontaminate

    assert files() == ("h.jsonl",)
    (tmp_path / "other.yaml").write_text(
        "tokenize: {output: out}\npretrain: {tasks: core, task_files: hf://datasets/a/b@main}\n"
        "evaluate: {tasks: 'core,piqa', hellaswag: h.jsonl}\n"
    )
    other = resolve(TokenizeConfig, "tokenize", ["--config", str(tmp_path / "other.yaml")], program="job")
    assert other.decontaminate == ("tasks:core@hf://datasets/a/b@main", "h.jsonl", "tasks:core,piqa")
    assert files("--decontaminate", "none") == ()
    assert files("--decontaminate", "a.jsonl", "b.jsonl") == ("a.jsonl", "b.jsonl")
    for wrong in (["none", "a.jsonl"], [""]):
        with pytest.raises(UserError, match="decontaminate has"):
            files("--decontaminate", *wrong)
