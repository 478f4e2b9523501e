"""The names of the files in a run folder, and the run folder that a checkpoint belongs to. Imports nothing of pipeline.

<run>/
    checkpoints/step-000500/    one folder for each checkpoint
    tracking.jsonl              journal: everything that the run reported
    tracking_sent.json          how much of the journal MLflow has
    mlflow_run.json             address of the run in MLflow, and of this folder, so that a copy of it is noticed
    run.json                    the run that a branch or a copy began from
    best.json                   step and val loss of the best checkpoint
    summary.json                results of the finished run
    evaluation.json             results of jobs/evaluate.py
    task_scores.json            its results on tasks, each kept as soon as it is there
    tasks.json                  the tasks that are scored during training, as its workers read them
    batch_size.json             sizes that --batch_size auto has found
    profile/                    traces and tables of --profile_steps
    logs/                       driver.log, controller.log, rank-000.log, ...: what the processes logged (log_files.py)
    report.html  curves.png     the report of the run, and its curves as a picture
"""

from __future__ import annotations

import re

CHECKPOINTS_FOLDER = "checkpoints"
JOURNAL_FILE = "tracking.jsonl"
JOURNAL_SENT_FILE = "tracking_sent.json"
MLFLOW_RUN_FILE = "mlflow_run.json"
RUN_FILE = "run.json"
BEST_FILE = "best.json"
SUMMARY_FILE = "summary.json"
SCORES_FILE = "evaluation.json"
TASK_SCORES_FILE = "task_scores.json"
TASKS_FILE = "tasks.json"
BATCH_SIZES_FILE = "batch_size.json"
PROFILE_FOLDER = "profile"
LOGS_FOLDER = "logs"
REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"

_CHECKPOINT = re.compile(rf"(?P<run>.+)/{CHECKPOINTS_FOLDER}/step-\d{{6,}}/?")


def run_folder_of(address: str) -> str | None:
    """The run folder of the checkpoint at ``address``, a path or a URL; None for a checkpoint outside of a run folder.

    The address must be the one that the checkpoint was written under, not that of a copy in the node's cache.
    """
    match = _CHECKPOINT.fullmatch(address)
    return match["run"] if match else None
