"""From the names of tasks to their questions: core, core/NAME, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.tasks import TaskSettings
from pipeline.errors import UserError
from pipeline.tasks.core import PREFIX, read_core
from pipeline.tasks.files import TaskFiles
from pipeline.tasks.harness import TASKS, read_harness_task
from pipeline.tasks.questions import Task
from pipeline.tasks.results import TaskResult, core_mean

CORE = "core"


def task_names(text: str) -> list[str]:
    """The names in ``text``, each once, in its order; UserError for one that is unknown. Those of CORE are not read."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = [CORE, f"{PREFIX}NAME", *sorted(TASKS)]
    for name in names:
        if name != CORE and name not in TASKS and not name.startswith(PREFIX):
            raise UserError(f"there is no task {name}; give of {', '.join(known)}, with commas between them")
    if not names:
        raise UserError(f"tasks is {text!r}; give of {', '.join(known)}, with commas between them")
    return names


def read_tasks(settings: TaskSettings) -> tuple[Task, ...]:
    """The tasks that the settings name; none where they name none.

    Raises:
        UserError: an unknown name, a missing file, a record that is no question.
    """
    if settings.tasks is None:
        return ()
    names = task_names(settings.tasks)
    files = TaskFiles(settings.task_files) if settings.task_files else None
    limit = settings.task_questions
    of_core = [name for name in names if name == CORE or name.startswith(PREFIX)]
    tasks: list[Task] = []
    if of_core:
        if files is None:
            raise UserError(f"the files of {of_core[0]} are not on the hub; give CORE's folder as --task_files")
        labels = None if CORE in of_core else [name.removeprefix(PREFIX) for name in of_core]
        tasks += read_core(files, labels, limit)
    return (*tasks, *(read_harness_task(name, files, limit) for name in names if name in TASKS))


def core_result(tasks: str, results: Mapping[str, TaskResult]) -> dict[str, float | None]:
    """CORE and its standard error, where ``tasks`` names all of it; otherwise nothing, for some tasks are no CORE."""
    mean = core_mean(results) if CORE in task_names(tasks) else None
    return {} if mean is None else {CORE: mean[0], f"{CORE}_stderr": mean[1]}
