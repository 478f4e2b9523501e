"""What a task is: questions, each with options of which one is right, and how a prompt is made of them.

An option is a context and a continuation. In multiple choice the context is the same in all options; in a schema the
continuation is, and the contexts differ; in language modeling there is one option, which the model is to say exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.errors import UserError
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import read_json

Kind = Literal["multiple_choice", "schema", "language_modeling"]
_MOST_BYTES = 2 << 30  # of stored tasks; CORE has about 160 MB


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. Either contexts or continuations are as many as its options; of the other there is one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int
    """Index of the right option."""

    @property
    def options(self) -> list[tuple[str, str]]:
        """Context and continuation of each option."""
        return [(context, continuation) for context in self.contexts for continuation in self.continuations]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named list of questions, with all that its score depends on but the model."""

    name: str
    kind: Kind
    style: Literal["core", "harness"]
    """Whose prompts and whose way of counting: CORE's, or those of lm-evaluation-harness (prompts.py)."""
    num_fewshot: int = 0
    """Number of other questions, with their answers, before each question."""
    delimiter: str = " "
    """Text between context and continuation."""
    baseline: float = 0.0
    """Accuracy of guessing, as a share; that of CORE's tasks is given with them."""
    questions: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        """Sha256 (hexadecimal) of all this."""
        return hashlib.sha256(json.dumps(asdict(self)).encode("utf-8", "surrogatepass")).hexdigest()


def store_tasks(tasks: Sequence[Task], folder: Folder, name: str) -> None:
    """Write tasks to a file that workers read, wherever the tasks came from."""
    folder.write(name, [json.dumps([asdict(task) for task in tasks]).encode()])


def stored_tasks(folder: Folder, name: str) -> tuple[Task, ...]:
    """The tasks in a file of store_tasks; UserError where there is none."""
    tasks = read_json(folder, name, tuple[Task, ...], mend="start the job again", most_bytes=_MOST_BYTES)
    if tasks is None:
        raise UserError(f"{folder}/{name}, the tasks to score, is missing; start the job again, which writes it")
    return tasks
