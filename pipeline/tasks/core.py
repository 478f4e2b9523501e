"""CORE's tasks in the layout in which nanochat publishes them, after the DataComp-LM paper (arXiv:2406.11794).

    core.yaml                 icl_tasks: label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter
    eval_meta_data.csv        Eval Task, Random baseline: the accuracy of guessing, in percent
    eval_data/NAME.jsonl      query, choices, gold; context_options, continuation, gold; or context, continuation

Questions are put into the order of a fixed seed before the first ones are taken, and a question's examples are drawn
from all that are left, as nanochat does it: with the same number of questions every prompt is the same as there.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from typing import Any, TypeAlias

import yaml
from typing_extensions import TypedDict

from pipeline.errors import UserError
from pipeline.storage.folders import is_file_name
from pipeline.storage.json_files import WrongJsonError, parse_json
from pipeline.tasks.files import TaskFiles, records
from pipeline.tasks.questions import Kind, Question, Task

PREFIX = "core/"
_CONFIG_FILE, _BASELINES_FILE, _DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
_ORDER_SEED = 1337  # nanochat's
_MOST_BYTES = 1 << 26  # of one question; passages are long

Text: TypeAlias = str | int | float


class _TaskEntry(TypedDict, total=False):
    label: str
    icl_task_type: Kind
    dataset_uri: str
    num_fewshot: list[int]
    continuation_delimiter: str


class _Config(TypedDict):
    icl_tasks: list[_TaskEntry]


class _MultipleChoice(TypedDict):
    query: Text
    choices: list[Text]
    gold: int


class _Schema(TypedDict):
    context_options: list[Text]
    continuation: Text
    gold: int


class _LanguageModeling(TypedDict):
    context: Text
    continuation: Text


_SCHEMAS: dict[Kind, type[Any]] = {
    "multiple_choice": _MultipleChoice,
    "schema": _Schema,
    "language_modeling": _LanguageModeling,
}


def read_core(files: TaskFiles, names: Sequence[str] | None = None, limit: int | None = None) -> list[Task]:
    """CORE's tasks in the order of core.yaml.

    Args:
        names: the labels of those to read, by default all.
        limit: number of questions of each, by default all.

    Raises:
        UserError: a file is missing or not of this layout, or there is no task of a name.
    """
    entries = {entry["label"]: entry for entry in _read_config(files)}
    for name in names or ():
        if name not in entries:
            raise UserError(f"{files} has no task {name}; its core.yaml names {', '.join(entries)}")
    baselines = _read_baselines(files)
    return [
        _read_task(files, entry, baselines, limit)
        for label, entry in entries.items()
        if names is None or label in names
    ]


def _read(files: TaskFiles, name: str) -> bytes:
    content = files.read(name)
    if content is None:
        raise UserError(f"{files} has no {name}; give the folder or the zip file of CORE's tasks as --task_files")
    return content


def _read_config(files: TaskFiles) -> list[_TaskEntry]:
    where = f"{files}/{_CONFIG_FILE}"
    try:
        values = yaml.safe_load(_read(files, _CONFIG_FILE))
        entries = parse_json(json.dumps(values).encode(), _Config)["icl_tasks"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is no list of CORE's tasks ({' '.join(str(error).split())}); fetch it anew"
        ) from error
    for number, entry in enumerate(entries, 1):
        missing = [key for key in ("label", "icl_task_type", "dataset_uri", "num_fewshot") if not entry.get(key)]
        if missing:
            raise UserError(f"{where}: task {entry.get('label', number)} has no {missing[0]}; fetch the file anew")
        if not is_file_name(entry["dataset_uri"]) or entry["num_fewshot"][0] < 0:
            raise UserError(f"{where}: task {entry['label']} names no file in {_DATA_FOLDER}, or examples below zero")
    return entries


def _read_baselines(files: TaskFiles) -> dict[str, float]:
    """Name of a task -> the accuracy of guessing, as a share."""
    where = f"{files}/{_BASELINES_FILE}"
    try:
        rows = csv.DictReader(io.StringIO(_read(files, _BASELINES_FILE).decode("utf-8-sig")))
        found = {row["Eval Task"]: float(row["Random baseline"] or "nan") / 100 for row in rows}
    except KeyError as error:
        raise UserError(f"{where} has no column {error}; fetch it anew") from error
    except (ValueError, csv.Error, TypeError) as error:
        raise UserError(f"{where} is no table of random baselines ({error}); fetch it anew") from error
    return found


def _read_task(files: TaskFiles, entry: _TaskEntry, baselines: dict[str, float], limit: int | None) -> Task:
    label, kind = entry["label"], entry["icl_task_type"]
    baseline = baselines.get(label, float("nan"))
    if not 0 <= baseline < 1:
        raise UserError(f"{files}/{_BASELINES_FILE} has no random baseline of {label} in percent; fetch the file anew")
    name = f"{_DATA_FOLDER}/{entry['dataset_uri']}"
    questions = [_question(values, kind, place) for place, values in records(_read(files, name), f"{files}/{name}")]
    if not questions:
        raise UserError(f"{files}/{name} has no question; fetch it anew")
    questions = [questions[number] for number in file_order(len(questions))][:limit]
    num_fewshot = entry["num_fewshot"][0]
    if num_fewshot >= len(questions):
        raise UserError(
            f"task {PREFIX}{label} shows {num_fewshot} examples before each question, but has {len(questions)} "
            "questions; raise --task_questions, or leave the task out"
        )
    return Task(
        name=f"{PREFIX}{label}",
        kind=kind,
        style="core",
        num_fewshot=num_fewshot,
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baseline,
        questions=tuple(questions),
    )


def file_order(count: int) -> list[int]:
    """Where the questions of a task of CORE stand in its file, from 0, in the order in which they are asked."""
    numbers = list(range(count))
    random.Random(_ORDER_SEED).shuffle(numbers)
    return numbers


def _question(values: dict[str, Any], kind: Kind, place: str) -> Question:
    try:
        found = parse_json(json.dumps(values).encode(), _SCHEMAS[kind], most_bytes=_MOST_BYTES)
    except (WrongJsonError, RecursionError) as error:
        raise UserError(f"{place} is no question of a {kind} task ({error}); fetch the file anew") from error
    if kind == "multiple_choice":
        contexts, continuations = [found["query"]], found["choices"]
    elif kind == "schema":
        contexts, continuations = found["context_options"], [found["continuation"]]
    else:
        contexts, continuations = [found["context"]], [found["continuation"]]
    return checked(contexts, continuations, found.get("gold", 0), place)


def checked(contexts: Sequence[Text], continuations: Sequence[Text], answer: int, place: str) -> Question:
    """A question; UserError where its answer is none of its options, or an answer is empty."""
    count = len(contexts) * len(continuations)
    if not 0 <= answer < count:
        raise UserError(f"{place}: the answer is option {answer}, but there are {count}; fetch the file anew")
    texts = tuple(map(str, continuations))
    if not all(text.strip() for text in texts):
        raise UserError(f"{place}: an answer is empty; fetch the file anew")
    question = Question(contexts=tuple(map(str, contexts)), continuations=texts, answer=answer)
    if not all(_is_utf8(text) for text in (*question.contexts, *texts)):
        raise UserError(f"{place}: half a character, which is no UTF-8, is in a text; fetch the file anew")
    return question


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
