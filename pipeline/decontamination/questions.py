"""The questions of evaluation sets: of files and of tasks, each with the texts that no document may hold.

A file is JSON lines, parquet, or plain lines of text; a record is a question. Of a HellaSwag question the context with
each of its endings is looked for, of any other record all its texts, one behind the other. Of the tasks that a model is
scored on (tasks/) each option is looked for, context and continuation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.data import TASKS
from pipeline.config.tasks import TaskSettings
from pipeline.errors import UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote.files import is_remote, list_files, open_file
from pipeline.remote.hub_client import fetch_file
from pipeline.remote.remote_file import redact_url

_MOST_BYTES = 1 << 30  # of a file of questions
_MARKUP = re.compile(r"\[(?:header|title|step|substeps)\]")  # of WikiHow's part of HellaSwag; no page has it
_NAMES = ("id", "ind", "question_id", "source_id")
"""Keys of a record that name it."""

Record = dict[str, Any]


class Question(NamedTuple):
    """Where a question stands, and what is looked for."""

    set: str
    """Name of the file or of the task."""
    number: int
    """Number of the line or row in the file, from 1; of a task that of the question, blank lines not counted."""
    id: str
    """What the record calls itself; empty where it has no name."""
    texts: tuple[str, ...]


def read_questions(names: Sequence[str]) -> tuple[list[Question], list[str]]:
    """The questions of files and tasks, and for each file and task its name and the sha256 of what was read.

    Args:
        names: local paths, s3://, gs://, https://, hf://[datasets/]OWNER/NAME[@REVISION]/FILE; tasks:NAMES[@FILES],
            names and files being as those of the settings tasks and task_files.

    Raises:
        UserError: a file or a task cannot be read, or has no question.
    """
    questions: list[Question] = []
    fingerprints: list[str] = []
    for name in names:
        found, sums = _of_tasks(name) if name.startswith(TASKS) else _of_file(name)
        questions += found
        fingerprints += sums
    return questions, fingerprints


# ---- tasks -----------------------------------------------------------------------------------------------------------


def check_names(names: Sequence[str]) -> None:
    """UserError where tasks:NAMES[@FILES] has a name that is unknown; their files are not read."""
    from pipeline.tasks.catalog import task_names

    for name in names:
        task_names(_names_and_files(name)[0])


def _names_and_files(name: str) -> tuple[str, str]:
    names, _, files = name.removeprefix(TASKS).partition("@")
    return names, files


def _of_tasks(name: str) -> tuple[list[Question], list[str]]:
    """All questions of tasks, however many of them a model is asked."""
    from pipeline.tasks.catalog import read_tasks  # they import torch, which nothing else needs here
    from pipeline.tasks.core import file_order

    names, files = _names_and_files(name)
    questions: list[Question] = []
    fingerprints = []
    for task in read_tasks(TaskSettings(tasks=names, task_files=files or None)):
        texts = [tuple(f"{context}{task.delimiter}{text}" for context, text in each.options) for each in task.questions]
        count = len(texts)
        numbers = file_order(count) if task.style == "core" else range(count)
        found = sorted((number + 1, own) for number, own in zip(numbers, texts, strict=True))
        fingerprints.append(f"{task.name} {hashlib.sha256(json.dumps(found).encode()).hexdigest()}")
        questions += [Question(task.name, number, "", own) for number, own in found]
    return questions, fingerprints


# ---- files -----------------------------------------------------------------------------------------------------------


def _of_file(file: str) -> tuple[list[Question], list[str]]:
    name, content = _content(file)
    found = [_question(name, number, record) for number, record in _records(name, content)]
    if not any(question.texts for question in found):
        raise UserError(f"{redact_url(file)} has no question; give JSON lines or parquet, a question a record")
    return found, [f"{name} {hashlib.sha256(content).hexdigest()}"]


def _content(file: str) -> tuple[str, bytes]:
    """Name and content of a file of questions."""
    place = redact_url(file)
    try:
        if file.startswith("hf://"):
            path = fetch_file(file)
        elif (url := in_bucket(file)) is not None or is_remote(file):
            return _remote_content(url or file)
        else:
            path = resolve_path(file)
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{place} has more than {_MOST_BYTES:,} bytes; --decontaminate takes files of questions")
        return file.rpartition("/")[2], path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the questions {place} cannot be read ({error.strerror or error}); give another file, or "
            "--decontaminate none to look for none"
        ) from error


def _remote_content(url: str) -> tuple[str, bytes]:
    _, files = list_files(url)
    if len(files) != 1 or files[0].size_bytes > _MOST_BYTES:
        raise UserError(f"{redact_url(url)} is not one file of at most {_MOST_BYTES:,} bytes; name one")
    with open_file(files[0]) as opened:
        return Path(files[0].name).name, opened.read()


def _records(name: str, content: bytes) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of every record of a file."""
    try:
        if name.endswith(".parquet"):
            yield from enumerate(pq.read_table(pa.BufferReader(content)).to_pylist(), 1)
            return
        lines = content.decode("utf-8-sig").split("\n")
    except (ValueError, OSError) as error:  # pyarrow's and Unicode's errors are ValueErrors
        raise UserError(f"the questions {name} cannot be read ({error}); give JSON lines or parquet") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if name.endswith(".txt"):
            yield number, line
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name}, line {number} is no JSON ({error}); give a question a line, as JSON or in a .txt file"
            ) from error


def _question(name: str, number: int, record: Any) -> Question:
    values: Record = record if isinstance(record, dict) else {}
    own = next((values[key] for key in _NAMES if isinstance(values.get(key), str | int)), "")
    texts = (text.encode("utf-8", "replace").decode() for text in _texts(record))  # half a character may be in JSON
    return Question(name, number, str(own), tuple(text for text in texts if text.strip()))


def _texts(record: Any) -> list[str]:
    values: Record = record if isinstance(record, dict) else {}
    endings = values.get("endings")
    if isinstance(endings, list) and {"ctx_a", "ctx_b"} <= values.keys():
        context = values.get("ctx") or f"{values['ctx_a']} {values['ctx_b']}"
        return [_MARKUP.sub(" ", f"{context} {ending}") for ending in endings]
    return ["\n".join(_strings(record))]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a record, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
