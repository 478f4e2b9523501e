"""HellaSwag: of four endings, which does the model find the likeliest? As lm-evaluation-harness asks and counts.

The questions are the published hellaswag_val.jsonl (10,042 of them), one JSON object a line. Text is prepared as the
harness's task does, the context and an ending are encoded together, and the log-probabilities of the ending's tokens
are summed: acc takes the ending with the largest sum, acc_norm the largest sum per character of the ending. Published
for GPT-2.5: acc_norm about 0.36; chance is 0.25. Held to the harness itself in tests/pipeline/test_hellaswag.py.

Shapes: B rows, T time, V vocab.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.bpe import Tokenizer
from pipeline.errors import UserError
from pipeline.parallel import Workers

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


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a hellaswag_val.jsonl, all by default.

    Raises:
        UserError: no such file, or a line that is no question with an answer.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"HellaSwag questions {path} cannot be read ({error}); give a hellaswag_val.jsonl") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines[:limit], 1) if line.strip()]
    if not questions:
        raise UserError(f"{path} has no question; give a hellaswag_val.jsonl")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
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


def encode(question: Question, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """(ids of context and ending, how many of them are the ending's), ending by ending.

    Context and ending are encoded as one text; what lies behind as many ids as the context has alone is the ending's.
    """
    context = question.context.rstrip()
    spaces = question.context[len(context) :]
    num_context = len(tokenizer.encode(context))
    rows = []
    for ending in question.endings:
        ids = tokenizer.encode(f"{context}{spaces} {ending}")
        rows.append((ids, len(ids) - num_context))
    return rows


@torch.no_grad()
def score(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    workers: Workers,
    *,
    tokens_per_batch: int,
) -> HellaSwagResult:
    """Accuracy of ``model`` on the questions, shared by the ranks; the same on every rank. Collective.

    Every rank runs as many forward passes as the others, each of about ``tokens_per_batch`` tokens, padding included.
    """
    rows = [row for question in questions for row in encode(question, tokenizer)]
    starts = torch.tensor([0, *(len(question.endings) for question in questions)]).cumsum(0).tolist()
    sums = torch.zeros(len(rows), dtype=torch.float64)
    training = model.training
    model.eval()
    batches = _batches([len(ids) for ids, _ in rows], tokens_per_batch)
    rounds = -(-len(batches) // workers.world_size)
    for number in range(rounds):
        index = number * workers.world_size + workers.rank
        chosen = batches[index] if index < len(batches) else batches[0][:1]  # takes part, does not count
        found = ending_log_probabilities(model, [rows[row] for row in chosen], workers.device)
        if index < len(batches):
            sums[chosen] = found.double().cpu()
    model.train(training)
    totals = workers.sum(sums.to(workers.device)).cpu()
    hits = hits_norm = 0
    for question, start in zip(questions, starts, strict=False):
        found = totals[start : start + len(question.endings)]
        lengths = torch.tensor([float(len(ending)) for ending in question.endings])
        hits += int(found.argmax()) == question.answer
        hits_norm += int((found / lengths).argmax()) == question.answer
    return HellaSwagResult(acc=hits / len(questions), acc_norm=hits_norm / len(questions), questions=len(questions))


def ending_log_probabilities(model: Transformer, rows: Sequence[tuple[list[int], int]], device: torch.device) -> Tensor:
    """Sum of log p over each row's last ids, in nats, (B,) float32; rows as ``encode`` gives them.

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
