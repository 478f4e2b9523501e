"""HellaSwag: of four endings, which does the model find the likeliest? As lm-evaluation-harness asks and counts.

The questions are the published hellaswag_val.jsonl (10,042 of them), one JSON object a line. Text is prepared as the
harness's task does, the context and an ending are encoded together, and the log-probabilities of the ending's tokens
are summed: acc takes the ending with the largest sum, acc_norm the largest sum per character of the ending. Published
for GPT-2.5: acc_norm about 0.36; chance is 0.25. Held to the harness itself in tests/evaluation/test_hellaswag.py.

Shapes: B rows, T time, V vocab.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.storage.folders import is_url, open_folder
from pipeline.tokenizer.bpe import Tokenizer

NUM_ENDINGS = 4
_KEYS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context and its endings, prepared for the model."""

    context: str
    endings: tuple[str, ...]
    answer: int
    """Number of the true ending."""


@dataclass(frozen=True, kw_only=True)
class HellaSwagResult:
    acc: float
    """Share of questions where the true ending is the likeliest."""
    acc_norm: float
    """The same per character of the ending: the figure that is usually quoted."""
    questions: int

    @property
    def standard_error(self) -> float:
        """Of acc_norm: what another sample of questions would change."""
        return float((self.acc_norm * (1 - self.acc_norm) / max(1, self.questions - 1)) ** 0.5)


def read_questions(path: Path | str, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a hellaswag_val.jsonl, or of the .parquet file that the hub has; all by default.

    Args:
        path: of a disk, or s3://BUCKET/NAME, gs://BUCKET/NAME.

    Raises:
        UserError: no such file, or a line (or row) that is no question with an answer.
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
    """The rows of a parquet file as JSON lines: the hub has the same fields under the same names."""
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
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, line {number} is no HellaSwag question with an answer: {error}") from error


def prepare(values: dict[str, Any]) -> Question:
    """One published question as the model sees it; ValueError where it has no answer, as the test set's have none."""
    context = f"{values['activity_label']}: {values['ctx_a']} {values['ctx_b'].capitalize()}"
    endings = tuple(clean(ending) for ending in values["endings"])
    answer = int(values["label"])
    if not 0 <= answer < len(endings):
        raise ValueError(f"label is {answer}, endings are {len(endings)}")
    return Question(context=clean(context), endings=endings, answer=answer)


def clean(text: str) -> str:
    """Without the marks that the WikiHow part of the questions was left with."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True, kw_only=True)
class EncodedQuestions:
    """Questions as ids, for any number of evaluations; a row is a context with one of its endings."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    """Of all rows, one behind the other."""
    offsets: npt.NDArray[np.int64]
    """Where rows begin, and where the last one ends."""
    ending_ids: npt.NDArray[np.int64]
    """Of each row, how many of its ids are the ending's."""
    endings: tuple[tuple[str, ...], ...]
    answers: tuple[int, ...]

    def row(self, number: int) -> tuple[list[int], int]:
        """Ids of a row, and how many of them are the ending's."""
        ids = self.ids[self.offsets[number] : self.offsets[number + 1]].tolist()
        return ids, int(self.ending_ids[number])


def encode_all(questions: Sequence[Question], tokenizer: Tokenizer) -> EncodedQuestions:
    """The questions' rows, in arrays: 10,042 questions are 8 MB.

    Context and ending are encoded as one text; what lies behind as many ids as the context has alone is the ending's.
    """
    stripped = [question.context.rstrip() for question in questions]
    texts = [
        f"{context}{question.context[len(context) :]} {ending}"
        for question, context in zip(questions, stripped, strict=True)
        for ending in question.endings
    ]
    ids, offsets = tokenizer.encode_batch(texts)
    _, context_offsets = tokenizer.encode_batch(stripped)
    num_context = np.repeat(np.diff(context_offsets), [len(question.endings) for question in questions])
    return EncodedQuestions(
        ids=ids,
        offsets=offsets,
        ending_ids=np.diff(offsets) - num_context,
        endings=tuple(question.endings for question in questions),
        answers=tuple(question.answer for question in questions),
    )


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    workers: ProcessGroup,
    *,
    tokens_per_batch: int,
) -> HellaSwagResult:
    """Accuracy of ``model`` on the questions; ``score_encoded`` of them. Collective."""
    return score_encoded(model, encode_all(questions, tokenizer), workers, tokens_per_batch=tokens_per_batch)


@torch.no_grad()
def score_encoded(
    model: Transformer, questions: EncodedQuestions, workers: ProcessGroup, *, tokens_per_batch: int
) -> HellaSwagResult:
    """Accuracy of ``model`` on the questions, shared by the ranks; the same on every rank. Collective.

    Every rank runs as many forward passes as the others, each of about ``tokens_per_batch`` tokens, padding included.
    """
    lengths = np.diff(questions.offsets).tolist()
    sums = torch.zeros(len(lengths), dtype=torch.float64)
    training = model.training
    model.eval()
    batches = _batches(lengths, tokens_per_batch)
    rounds = -(-len(batches) // workers.world_size)
    for number in range(rounds):
        index = number * workers.world_size + workers.rank
        chosen = batches[index] if index < len(batches) else batches[0][:1]  # takes part, does not count
        found = ending_log_probabilities(model, [questions.row(row) for row in chosen], workers.device)
        if index < len(batches):
            sums[chosen] = found.double().cpu()
    model.train(training)
    return _count_hits(questions, workers.sum(sums.to(workers.device)).cpu())


def _count_hits(questions: EncodedQuestions, log_probabilities: Tensor) -> HellaSwagResult:
    """log_probabilities: of each row's ending."""
    hits = hits_norm = start = 0
    for endings, answer in zip(questions.endings, questions.answers, strict=True):
        found = log_probabilities[start : start + len(endings)]
        characters = torch.tensor([float(len(ending)) for ending in endings])
        hits += int(found.argmax()) == answer
        hits_norm += int((found / characters).argmax()) == answer
        start += len(endings)
    count = len(questions.answers)
    return HellaSwagResult(acc=hits / count, acc_norm=hits_norm / count, questions=count)


def ending_log_probabilities(model: Transformer, rows: Sequence[tuple[list[int], int]], device: torch.device) -> Tensor:
    """Sum of log p over each row's last ids, in nats, (B,) float32; rows as in EncodedQuestions.

    A row longer than the context loses its beginning.
    """
    length = model.config.context_length
    cut = [(ids[-(length + 1) :], min(count, length)) for ids, count in rows]
    longest = max(len(ids) for ids, _ in cut) - 1
    tokens = torch.zeros(len(cut), longest, dtype=torch.int64)
    for row, (ids, _) in enumerate(cut):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # filled up on the right, which no real position sees
    logits = model(tokens.to(device))  # (B, T, V)
    sums = []
    for row, (ids, count) in enumerate(cut):
        targets = torch.tensor(ids[-count:], device=device)
        own = logits[row, len(ids) - 1 - count : len(ids) - 1].float()  # (count, V)
        sums.append((own.gather(1, targets[:, None])[:, 0] - own.logsumexp(dim=1)).sum())
    return torch.stack(sums)


def _batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers in groups of about equal length, the longest first: what does not fit into memory shows at once."""
    return list(_grouped(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)), lengths, tokens_per_batch))


def _grouped(order: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // lengths[order[start]])
        yield list(order[start : start + count])
        start += count
