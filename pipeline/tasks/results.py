"""Scores of tasks, each with its standard error, and CORE, the mean of centred accuracies.

The standard error of a mean over n questions is their sample standard deviation over the root of n, as
lm-evaluation-harness has it; the questions of CORE's tasks are taken to be independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tasks.core import PREFIX
from pipeline.tasks.prompts import EncodedTask
from pipeline.tasks.rows import RowScores

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores on one task; None where the task has none of it, or one question only, which has no deviation."""

    questions: int
    num_fewshot: int
    acc: float
    """Share of questions answered right: by the likeliest option (of CORE's tasks the likeliest per token), or, in
    language modeling, by saying every token of the answer."""
    acc_stderr: float | None
    acc_norm: float | None = None
    """The same with log-probabilities per character, of multiple choice in the harness's way of counting."""
    acc_norm_stderr: float | None = None
    centered: float | None = None
    """Of CORE's tasks: 0 for the accuracy of guessing, 1 for all right."""
    centered_stderr: float | None = None
    bits_per_byte: float
    """Bits of the right answer's scored tokens for each byte of them, mean over the questions."""
    bits_per_byte_stderr: float | None
    perplexity: float | None = None
    """Of language modeling in the harness's way of counting: exp of the mean loss of a whole answer."""

    def figures(self, name: str) -> dict[str, float]:
        """The scores under the names of metrics: arc_easy_acc, core_piqa_centered."""
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "num_fewshot"}
        return {f"{name.replace('/', '_')}_{key}": value for key, value in values.items()}


def count(encoded: EncodedTask, scores: RowScores, byte_lengths: npt.NDArray[np.int64]) -> TaskResult:
    """The result of a task, from what a model makes of its rows.

    Args:
        byte_lengths: (V,) bytes of text that each id stands for.
    """
    task, rows = encoded.task, encoded.rows
    sums: Floats = scores.log_probabilities.numpy()
    answers = np.array([question.answer for question in task.questions])
    right = encoded.first_rows[:-1] + answers  # the row of each right answer
    num_bytes = np.array([byte_lengths[_scored_ids(encoded, row)].sum() for row in right.tolist()])
    bits = -sums[right] / math.log(2) / np.maximum(num_bytes, 1)
    values: dict[str, Any] = {"questions": len(answers), "num_fewshot": task.num_fewshot}
    values |= _mean("bits_per_byte", bits)
    if task.kind == "language_modeling":
        values |= _mean("acc", scores.are_likeliest.numpy().astype(np.float64))
        if task.style == "harness":
            values["perplexity"] = _perplexity(-float(sums.mean()))
    else:
        values |= _mean("acc", _hits(encoded, sums / rows.scored if task.style == "core" else sums))
    if (task.style, task.kind) == ("harness", "multiple_choice"):
        values |= _mean("acc_norm", _hits(encoded, sums / _characters(encoded)))
    if task.style == "core":
        above_guessing = 1 - task.baseline
        values["centered"] = (values["acc"] - task.baseline) / above_guessing
        error = values["acc_stderr"]
        values["centered_stderr"] = None if error is None else error / above_guessing
    return TaskResult(**values)


def _scored_ids(encoded: EncodedTask, row: int) -> npt.NDArray[Any]:
    stop = int(encoded.rows.offsets[row + 1])
    return encoded.rows.ids[stop - int(encoded.rows.scored[row]) : stop]


def _characters(encoded: EncodedTask) -> Floats:
    """Length of each row's continuation in characters, without the delimiter, as in the harness."""
    return np.array([float(len(text)) for question in encoded.task.questions for _, text in question.options])


def _hits(encoded: EncodedTask, values: Floats) -> Floats:
    """1 for each question whose right option has the largest value, the first of equal ones, and otherwise 0."""
    starts, stops = encoded.first_rows[:-1].tolist(), encoded.first_rows[1:].tolist()
    chosen = [int(values[start:stop].argmax()) for start, stop in zip(starts, stops, strict=True)]
    answers = [question.answer for question in encoded.task.questions]
    return np.array([float(one == other) for one, other in zip(chosen, answers, strict=True)])


def _mean(name: str, values: Floats) -> dict[str, float | None]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_stderr": error}


def _perplexity(loss: float) -> float | None:
    """exp(loss); None where that is no float."""
    return math.exp(loss) if loss < 700 else None


def core_mean(results: Mapping[str, TaskResult]) -> tuple[float, float | None] | None:
    """CORE and its standard error: the mean of the centred accuracies of the results that are CORE's tasks."""
    found = [result for name, result in results.items() if name.startswith(PREFIX)]
    centered = [result.centered for result in found if result.centered is not None]
    if not centered:
        return None
    errors = [result.centered_stderr for result in found]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(each * each for each in known)) / len(found) if len(known) == len(found) else None
    return sum(centered) / len(centered), error


def all_figures(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """The figures of all tasks."""
    return {key: value for name, result in results.items() for key, value in result.figures(name).items()}
