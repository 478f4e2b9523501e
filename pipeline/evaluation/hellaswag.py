"""HellaSwag: which of four endings is the likeliest for the model? Scored as lm-evaluation-harness does it.

The questions are the published hellaswag_val.jsonl (10,042 of them), one JSON object per line. Text is cleaned as in
the harness's task, the context and an ending are encoded together, and the log-probabilities of the ending's tokens are
summed: acc chooses the ending with the largest sum, acc_norm the one with the largest sum per character. Published for
GPT-2.5: acc_norm about 0.36; chance is 0.25. tests/evaluation/test_hellaswag.py compares it with the harness itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import is_url, open_folder
from pipeline.tasks import harness
from pipeline.tasks.prompts import encode_pairs
from pipeline.tasks.rows import EncodedRows, join_rows, score_rows
from pipeline.tokenizer.bpe import Tokenizer

NUM_ENDINGS = 4
_KEYS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context and its endings, cleaned."""

    context: str
    endings: tuple[str, ...]
    answer: int
    """Index of the true ending."""


@dataclass(frozen=True, kw_only=True)
class HellaSwagResult:
    acc: float
    """Share of questions whose true ending is the likeliest."""
    acc_norm: float
    """The same with log-probabilities per character of the ending; the figure that is usually quoted."""
    questions: int

    def figures(self) -> dict[str, float]:
        """The result under its names in evaluation.json and summary.json."""
        return {f"hellaswag_{name}": value for name, value in asdict(self).items()}


def read_questions(path: Path | str, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions (by default all) of a hellaswag_val.jsonl, or of the hub's .parquet file.

    Args:
        path: a local path, s3://BUCKET/NAME or gs://BUCKET/NAME.

    Raises:
        UserError: the file does not exist, or a line (or row) is not a question with an answer.
    """
    try:
        folder, _, name = str(path).rpartition("/")
        content = open_folder(folder).read(name) if is_url(str(path)) else Path(path).read_bytes()
        lines = _parquet_lines(content) if name.endswith(".parquet") else content.decode().split("\n")
    except (OSError, ValueError) as error:  # pyarrow's and Unicode's errors are ValueErrors
        raise UserError(f"HellaSwag questions {path} cannot be read ({error}); give a hellaswag_val.jsonl") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines[:limit], 1) if line.strip()]
    if not questions:
        raise UserError(f"{path} has no question; give a hellaswag_val.jsonl")
    return questions


def _parquet_lines(content: bytes) -> list[str]:
    """The rows of a parquet file as JSON lines; the hub's file has the same fields under the same names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return [json.dumps(row) for row in pq.read_table(pa.BufferReader(content)).to_pylist()]


def _question(path: Path | str, number: int, line: str) -> Question:
    try:
        values = json.loads(line)
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise UserError(f"{path}, line {number} has no {missing[0]}; give a hellaswag_val.jsonl")
        return prepare(values)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}, line {number} is no HellaSwag question with an answer: {error}") from error


def prepare(values: dict[str, Any]) -> Question:
    """Clean one published question; ValueError where it has no answer, like those of the test set."""
    (context,), endings, answer = harness.hellaswag(values)
    if not 0 <= answer < len(endings):
        raise ValueError(f"label is {answer}, endings are {len(endings)}")
    return Question(context=context, endings=tuple(endings), answer=answer)


@dataclass(frozen=True, kw_only=True)
class EncodedQuestions:
    """Questions as token ids, for any number of evaluations; a row is a context with one of its endings."""

    rows: EncodedRows
    endings: tuple[tuple[str, ...], ...]
    answers: tuple[int, ...]

    def row(self, number: int) -> tuple[list[int], int]:
        """The ids of a row, and how many of them belong to the ending."""
        return self.rows.row(number)


def encode_all(questions: Sequence[Question], tokenizer: Tokenizer) -> EncodedQuestions:
    """Encode questions into arrays; 10,042 questions take 8 MB."""
    pairs = [(question.context, f" {ending}") for question in questions for ending in question.endings]
    return EncodedQuestions(
        rows=join_rows(encode_pairs(pairs, tokenizer), tokenizer.id_dtype),
        endings=tuple(question.endings for question in questions),
        answers=tuple(question.answer for question in questions),
    )


def score(
    model: Transformer, questions: EncodedQuestions, workers: ProcessGroup, *, tokens_per_batch: int
) -> HellaSwagResult:
    """Accuracy of ``model`` on the questions, which the ranks share; the same result on every rank. Collective."""
    scores = score_rows(model, questions.rows, workers, tokens_per_batch=tokens_per_batch)
    return _count_hits(questions, scores.log_probabilities)


def _count_hits(questions: EncodedQuestions, log_probabilities: Tensor) -> HellaSwagResult:
    """Compare the log-probabilities of all rows' endings, (number of rows,), with the answers."""
    hits = hits_norm = start = 0
    for endings, answer in zip(questions.endings, questions.answers, strict=True):
        values = log_probabilities[start : start + len(endings)]
        characters = torch.tensor([float(len(ending)) for ending in endings])
        hits += int(values.argmax()) == answer
        hits_norm += int((values / characters).argmax()) == answer
        start += len(endings)
    count = len(questions.answers)
    return HellaSwagResult(acc=hits / count, acc_norm=hits_norm / count, questions=count)
