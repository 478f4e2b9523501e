"""Settings that jobs/evaluate.py and jobs/pretrain.py share: which tasks a model is asked, and where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.settings import require


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The tasks that a model is asked (tasks/catalog.py)."""

    tasks: str | None = None
    """Tasks to score, with commas between them: core for all of CORE, core/NAME for one of its tasks, or those of
    lm-evaluation-harness: arc_challenge, arc_easy, boolq, copa, hellaswag, lambada, openbookqa, piqa, winogrande. If
    not given, none."""
    task_files: str | None = None
    """Folder or zip file of the tasks: core.yaml, eval_data/ and eval_meta_data.csv for CORE, as nanochat publishes
    them, and NAME.jsonl or NAME.parquet for another task; local, s3://, gs://, https:// or hf://datasets/OWNER/NAME.
    If not given, or where a task is not in it, tasks other than CORE's come from the hub."""
    task_questions: int | None = None
    """Number of questions of each task to use. If not given, all of them."""


@dataclass(frozen=True, kw_only=True)
class PeriodicTaskSettings(TaskSettings):
    """The same during training."""

    tasks_every: int = 2000
    """Number of steps between two scorings of the tasks; the last step has one too."""


def check_tasks(config: Any) -> None:
    """What of the settings only makes sense with tasks, and what asks for the same twice."""
    for name in ("task_files", "task_questions"):
        value = getattr(config, name)
        require(
            value is None or config.tasks is not None,
            f"{name} is {value}, but no tasks are given; give --tasks, or leave it out",
        )
    twice = config.tasks is not None and "hellaswag" in config.tasks.split(",") and config.hellaswag is not None
    require(not twice, f"tasks has hellaswag, and hellaswag is {config.hellaswag}; give one of them")
