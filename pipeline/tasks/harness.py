"""The tasks of lm-evaluation-harness that this project knows, from the published data sets to its prompts.

No example is shown before a question. Each function takes a record as its data set has it and says what the harness
(0.4.13) makes of it: context, options, answer. tests/tasks/test_harness.py compares with the harness itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.tasks.core import checked
from pipeline.tasks.files import TaskFiles, fetch, records
from pipeline.tasks.questions import Kind, Question, Task

Parts = tuple[list[str], list[str], int]
"""Contexts, continuations, index of the right option."""


def hellaswag(values: Mapping[str, Any]) -> Parts:
    """Text is without the markup that remains in the WikiHow part of the questions."""
    context = f"{values['activity_label']}: {values['ctx_a']} {values['ctx_b'].capitalize()}"
    return [_clean(context)], [_clean(ending) for ending in values["endings"]], int(values["label"])


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return "\n".join(map(_without_brackets, text.split("\n"))).replace("  ", " ")


def _without_brackets(line: str) -> str:
    """As the harness's re.sub(r"\\[.*?\\]", "", line), in linear time: behind the last ] nothing is looked for."""
    head, last, rest = line.rpartition("]")
    return re.sub(r"\[.*?\]", "", head + last) + rest


def _arc(values: Mapping[str, Any]) -> Parts:
    choices = values["choices"]
    return (
        [f"Question: {values['question']}\nAnswer:"],
        list(choices["text"]),
        list(choices["label"]).index(values["answerKey"]),
    )


def _openbookqa(values: Mapping[str, Any]) -> Parts:
    choices = values["choices"]
    return [values["question_stem"]], list(choices["text"]), list(choices["label"]).index(values["answerKey"].lstrip())


def _piqa(values: Mapping[str, Any]) -> Parts:
    return [f"Question: {values['goal']}\nAnswer:"], [values["sol1"], values["sol2"]], int(values["label"])


def _boolq(values: Mapping[str, Any]) -> Parts:
    return [f"{values['passage']}\nQuestion: {values['question']}?\nAnswer:"], ["no", "yes"], int(values["label"])


def _copa(values: Mapping[str, Any]) -> Parts:
    connector = {"cause": "because", "effect": "therefore"}[values["question"]]
    choices = [values["choice1"], values["choice2"]]
    # The choices begin with a space of their own, and the delimiter is put before it.
    endings = [f" {choice[0].lower()}{choice[1:]}" for choice in choices]
    return [f"{values['premise'].strip()[:-1]} {connector}"], endings, int(values["label"])


def _winogrande(values: Mapping[str, Any]) -> Parts:
    """The options stand in the blank of the sentence; what follows it is the same, and alone is scored."""
    sentence = values["sentence"]
    blank = sentence.index("_")
    contexts = [sentence[:blank] + values["option1"], sentence[:blank] + values["option2"]]
    return contexts, [sentence[blank + 1 :].strip()], {"1": 0, "2": 1}[values["answer"]]


def _lambada(values: Mapping[str, Any]) -> Parts:
    """The last word of a text is to be said."""
    context, _, word = values["text"].rpartition(" ")
    return [context], [word], 0


@dataclass(frozen=True, kw_only=True)
class _Published:
    address: str
    """The files of the split that the harness asks, on the hub, in the form of parquet that the hub makes of all."""
    make: Callable[[Mapping[str, Any]], Parts]
    kind: Kind = "multiple_choice"


def _on_hub(name: str, place: str) -> str:
    return f"hf://datasets/{name}@~parquet/{place}/*.parquet"


TASKS: dict[str, _Published] = {
    "arc_challenge": _Published(address=_on_hub("allenai/ai2_arc", "ARC-Challenge/test"), make=_arc),
    "arc_easy": _Published(address=_on_hub("allenai/ai2_arc", "ARC-Easy/test"), make=_arc),
    "boolq": _Published(address=_on_hub("aps/super_glue", "boolq/validation"), make=_boolq),
    "copa": _Published(address=_on_hub("aps/super_glue", "copa/validation"), make=_copa),
    "hellaswag": _Published(address=_on_hub("Rowan/hellaswag", "default/validation"), make=hellaswag),
    "lambada": _Published(
        address=_on_hub("EleutherAI/lambada_openai", "default/test"), make=_lambada, kind="language_modeling"
    ),
    "openbookqa": _Published(address=_on_hub("allenai/openbookqa", "main/test"), make=_openbookqa),
    "piqa": _Published(address=_on_hub("baber/piqa", "*/validation"), make=_piqa),
    "winogrande": _Published(
        address=_on_hub("allenai/winogrande", "winogrande_xl/validation"), make=_winogrande, kind="schema"
    ),
}


def read_harness_task(name: str, files: TaskFiles | None, limit: int | None = None) -> Task:
    """A task from ``files`` where they have NAME.jsonl or NAME.parquet, and otherwise from the hub.

    Args:
        limit: number of questions, from the first; by default all.

    Raises:
        UserError: the files cannot be read, or a record is no question of this task.
    """
    published = TASKS[name]
    questions: list[Question] = []
    for where, content in _contents(name, files):
        for place, values in records(content, where):
            if limit is not None and len(questions) >= limit:
                break
            questions.append(_question(published, name, values, place))
    if not questions:
        raise UserError(f"task {name} has no question in {files or published.address}; give other --task_files")
    guessing = sum(1 / len(question.options) for question in questions) / len(questions)
    return Task(
        name=name,
        kind=published.kind,
        style="harness",
        baseline=0.0 if published.kind == "language_modeling" else guessing,
        questions=tuple(questions),
    )


def _contents(name: str, files: TaskFiles | None) -> list[tuple[str, bytes]]:
    """Name for messages and content of each file of a task."""
    for suffix in ("jsonl", "parquet") if files else ():
        assert files is not None
        content = files.read(f"{name}.{suffix}")
        if content is not None:
            return [(f"{files}/{name}.{suffix}", content)]
    address = TASKS[name].address
    contents = fetch(address)
    if not contents:
        raise UserError(f"the hub has no {address}; give a folder with {name}.jsonl or {name}.parquet as --task_files")
    return [(address, content) for content in contents]


def _question(published: _Published, name: str, values: Mapping[str, Any], place: str) -> Question:
    try:
        contexts, continuations, answer = published.make(values)
        texts = [*contexts, *continuations]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is none")
    except KeyError as error:
        raise UserError(f"{place} is no question of {name}: it has no {error}; give the published file") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{place} is no question of {name} ({error}); give the published file") from error
    return checked(contexts, continuations, answer, place)
