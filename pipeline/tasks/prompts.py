"""From questions to rows of ids, in the two ways that published scores are counted by.

CORE (nanochat, after DataComp-LM): <|endoftext|>, then the examples, each with its answer and an empty line behind it,
then context, delimiter and continuation. The whole is encoded as one text. In multiple choice the ids that follow those
which all options begin with are scored; in a schema those at the end that all have in common; in language modeling
those behind the prompt without its answer. A row of more tokens than the context holds loses its beginning.

lm-evaluation-harness: context and continuation are encoded as one text; the context has as many ids as it has alone,
white space at its end counted to the continuation, and the rest is scored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tasks.questions import Question, Task
from pipeline.tasks.rows import EncodedRows, join_rows
from pipeline.tokenizer.bpe import Tokenizer

_EXAMPLES_SEED = 1234  # nanochat's; the number of the question is added
_QUESTIONS_AT_ONCE = 256  # texts of so many are in memory

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task as rows of ids, one for each option of each question."""

    task: Task
    rows: EncodedRows
    first_rows: npt.NDArray[np.int64]
    """(number of questions + 1,) The row of each question's first option, and the number of all rows."""


def encode_task(task: Task, tokenizer: Tokenizer, context_length: int) -> EncodedTask:
    """Encode all questions of a task for a model of this context length."""
    find = _core_rows if task.style == "core" else _harness_rows
    counts = [len(question.options) for question in task.questions]
    return EncodedTask(
        task=task,
        rows=join_rows(find(task, tokenizer, context_length), tokenizer.id_dtype),
        first_rows=np.cumsum([0, *counts], dtype=np.int64),
    )


# ---- CORE ------------------------------------------------------------------------------------------------------------


def core_prompts(task: Task, number: int) -> list[str]:
    """The texts of a question's options; in language modeling the prompt without its answer comes first."""
    begin = "".join(f"{_solved(task, task.questions[other])}\n\n" for other in _examples(task, number))
    question = task.questions[number]
    if task.kind != "language_modeling":
        return [f"{begin}{context}{task.delimiter}{text}" for context, text in question.options]
    prompt = f"{begin}{question.contexts[0].strip()}{task.delimiter}"
    return [prompt.rstrip(), f"{prompt}{question.continuations[0]}"]


def _examples(task: Task, number: int) -> list[int]:
    """Numbers of the questions that are shown before a question, which is none of them."""
    others = range(len(task.questions) - 1)
    chosen = random.Random(_EXAMPLES_SEED + number).sample(others, task.num_fewshot)
    return [other + (other >= number) for other in chosen]


def _solved(task: Task, question: Question) -> str:
    context, continuation = question.options[question.answer]
    if task.kind == "language_modeling":
        context = context.strip()
    return f"{context}{task.delimiter}{continuation}"


def _core_rows(task: Task, tokenizer: Tokenizer, context_length: int) -> Iterator[tuple[Ids, int]]:
    for start in range(0, len(task.questions), _QUESTIONS_AT_ONCE):
        numbers = range(start, min(start + _QUESTIONS_AT_ONCE, len(task.questions)))
        prompts = [core_prompts(task, number) for number in numbers]
        encoded = iter(_encode(tokenizer, [text for texts in prompts for text in texts]))
        for texts in prompts:
            rows = [[tokenizer.eot_id, *next(encoded)] for _ in texts]
            for ids, count in _scored_part(task, rows):
                kept = ids[-context_length:]
                yield kept, min(count, len(kept) - 1)


def _scored_part(task: Task, rows: list[list[int]]) -> list[tuple[Ids, int]]:
    """The rows of a question's options and how many ids of each are scored: at least one, and never the first."""
    shortest = min(map(len, rows))
    if task.kind == "schema":
        common = _common_length([row[::-1] for row in rows])
        return [(row, min(common, shortest - 1)) for row in rows]
    common = _common_length(rows)
    if task.kind == "language_modeling":
        return [(rows[1], len(rows[1]) - min(common, len(rows[1]) - 1))]
    return [(row, len(row) - min(common, shortest - 1)) for row in rows]


def _common_length(rows: Sequence[Ids]) -> int:
    """How many ids all rows begin with."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------


def _harness_rows(task: Task, tokenizer: Tokenizer, context_length: int) -> Iterator[tuple[Ids, int]]:
    del context_length  # a row that is too long is cut where it is scored
    for start in range(0, len(task.questions), _QUESTIONS_AT_ONCE):
        questions = task.questions[start : start + _QUESTIONS_AT_ONCE]
        pairs = [option for question in questions for option in question.options]
        yield from encode_pairs([(context, task.delimiter + text) for context, text in pairs], tokenizer)


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[Ids, int]]:
    """The ids of each context with its continuation, and how many of them belong to the continuation.

    An empty context is <|endoftext|>.
    """
    contexts = _encode(tokenizer, [context.rstrip() for context, _ in pairs])
    whole = _encode(tokenizer, [context + continuation for context, continuation in pairs])
    for before, ids in zip(contexts, whole, strict=True):
        if len(before):
            yield ids, len(ids) - len(before)
        else:
            yield [tokenizer.eot_id, *ids], len(ids)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
    ids, offsets = tokenizer.encode_batch(list(texts))
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]
