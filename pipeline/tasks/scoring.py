"""A model's scores on tasks, one after the other; each is kept as soon as it is there.

task_scores.json holds, for one model, the result of every task that was scored, with the fingerprint of the task. The
same command, started again, scores the others. Another model, or other questions, begin anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from model.transformer import Transformer
from pipeline.dataset.token_counts import byte_lengths
from pipeline.distributed.process_group import ProcessGroup
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import DamagedFileError, read_json, write_json
from pipeline.tasks.prompts import encode_task
from pipeline.tasks.questions import Task
from pipeline.tasks.results import TaskResult, count
from pipeline.tasks.rows import score_rows
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeptResult:
    task: str
    """Fingerprint of the task."""
    result: TaskResult


@dataclass(frozen=True, kw_only=True)
class KeptScores:
    """The content of task_scores.json."""

    model: str
    """Fingerprint of the model."""
    results: dict[str, KeptResult] = field(default_factory=dict)
    """By the name of the task."""

    def result_of(self, task: Task) -> TaskResult | None:
        kept = self.results.get(task.name)
        return kept.result if kept is not None and kept.task == task.fingerprint else None


def read_kept(folder: Folder, name: str, model: str) -> KeptScores:
    """What was kept of this model; nothing where the file is of another one, absent or damaged."""
    try:
        kept = read_json(folder, name, KeptScores, mend="the tasks are scored again")
    except DamagedFileError as error:
        logger.warning("%s", error)
        kept = None
    return kept if kept is not None and kept.model == model else KeptScores(model=model)


def score_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    workers: ProcessGroup,
    *,
    tokens_per_batch: int,
    kept: KeptScores | None = None,
    keep_in: tuple[Folder, str] | None = None,
) -> dict[str, TaskResult]:
    """The result of each task by its name, in the order of ``tasks``; the same on every rank. Collective.

    Args:
        kept: results that are not measured again; the same on every rank.
        keep_in: folder and name of the file in which rank 0 keeps them after each task.
    """
    kept = kept or KeptScores(model="")
    keeping = dict(kept.results)
    lengths = byte_lengths(tokenizer)
    results: dict[str, TaskResult] = {}
    for task in tasks:
        known = kept.result_of(task)
        if known is None:
            encoded = encode_task(task, tokenizer, model.config.context_length)
            scores = score_rows(model, encoded.rows, workers, tokens_per_batch=tokens_per_batch)
            known = count(encoded, scores, lengths)
            keeping[task.name] = KeptResult(task=task.fingerprint, result=known)
            if keep_in is not None and workers.is_rank_zero:
                write_json(*keep_in, asdict(KeptScores(model=kept.model, results=keeping)))
        if workers.is_rank_zero:
            logger.info("%s: accuracy %.4f on %s questions", task.name, known.acc, f"{known.questions:,}")
        results[task.name] = known
    return results
