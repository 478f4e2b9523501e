"""Train a network on shards: ``python jobs/pretrain.py --config configs/demo.yaml``; --help lists the flags.

The same command again goes on from the newest checkpoint of its --output folder, or says that the run is done.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import Rows, print_table, run, would_fail
from pipeline.config.training import PretrainConfig


def main(config: PretrainConfig) -> None:
    from pipeline.evaluation.validation import perplexity_text
    from pipeline.paths import resolve_output
    from pipeline.run_files import REPORT_FILE
    from pipeline.tracking import journal
    from pipeline.training import launch

    summary, mlflow_run = launch.pretrain(config)
    output = resolve_output(config.output)
    val_rows = [("val loss", "none (--val_every 0)")]
    if summary.val_loss is not None:
        val_rows = [
            ("val loss", f"{summary.val_loss:.4f} on {summary.val_tokens:,} tokens"),
            ("perplexity", perplexity_text(summary.val_loss)),
        ]
    rows = [
        ("parameters", f"{summary.parameters:,}"),
        ("steps", f"{summary.steps:,} ({summary.tokens_seen:,} tokens)"),
        ("train loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}"),
        *val_rows,
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
        ("peak memory", f"{summary.peak_memory_gib:.2f} GiB on rank 0"),
        ("sample", repr(summary.sample)),
        ("checkpoint", summary.checkpoint),
    ]
    if summary.hellaswag_acc_norm is not None:
        questions = f"{summary.hellaswag_questions:,} questions"
        rows.append(
            ("HellaSwag", f"{summary.hellaswag_acc_norm:.4f} acc_norm, {summary.hellaswag_acc:.4f} acc, {questions}")
        )
    if summary.task_scores:
        shown = {name: value for name, value in summary.task_scores.items() if name == "core" or name.endswith("_acc")}
        rows.append(("tasks", ", ".join(f"{name} {value:.4f}" for name, value in shown.items())))
    if summary.best_step is not None:
        rows.append(("best", f"step {summary.best_step:,}, val loss {summary.best_val_loss:.4f}"))
    if output.size(REPORT_FILE) is not None:
        rows.append(("report", f"{output}/{REPORT_FILE}"))
    rows.append(("MLflow", mlflow_run.location))
    waiting = journal.count_waiting(output, mlflow_run.run_id)
    if waiting:
        rows.append(("", f"has not received {waiting:,} points; they are in {output}, and the same command sends them"))
    print_table("pretrain: done", rows)


def describe(config: PretrainConfig) -> Rows:
    """What --dry_run says of the run. It starts nothing; the manifest of --data is read if it is there."""
    from pipeline.cluster.ray_cluster import require_device
    from pipeline.config.run_plan import describe_run
    from pipeline.dataset.manifest import Manifest
    from pipeline.dataset.training_data import require_mixable
    from pipeline.errors import UserError
    from pipeline.paths import resolve_output
    from pipeline.run_files import SUMMARY_FILE

    mistakes = would_fail(
        lambda: require_device(config.device),
        lambda: _check_questions(config.hellaswag),
        lambda: _check_tasks(config.tasks),
        lambda: resolve_output(config.output).size(SUMMARY_FILE),
    )
    folders = [resolve_output(folder) for folder in config.mixture.folders]
    try:
        manifests = [Manifest.load(folder) for folder in folders]
    except UserError as error:
        return describe_run(config, data_error=str(error)) + mistakes
    require_mixable(folders, manifests)
    vocab_size = manifests[0].vocab_size
    config.check_vocab_size(vocab_size)
    train_tokens = [manifest.tokens("train") for manifest in manifests]
    plan = describe_run(config, vocab_size=vocab_size, train_tokens=train_tokens)
    return plan + _packing_rows(config) + mistakes


def _packing_rows(config: PretrainConfig) -> Rows:
    """What --packing best_fit does to the documents of each folder; those of a bucket are not fetched for it."""
    from pipeline.dataset.packed_documents import describe_packing
    from pipeline.paths import resolve_output

    if config.packing != "best_fit":
        return []
    folders = [resolve_output(folder) for folder in config.mixture.folders]
    found = [describe_packing(folder, window_length=config.context_length + 1) for folder in folders]
    return [("" if number else "packing", sentence) for number, sentence in enumerate(found)]


def _check_questions(hellaswag: str | None) -> None:
    """UserError where a file of questions is missing; one of the hub is not fetched."""
    if hellaswag and not hellaswag.startswith("hf://"):
        from pipeline.pretrained.resolve import find_questions

        find_questions(hellaswag)


def _check_tasks(tasks: str | None) -> None:
    """UserError for a task that is unknown; their files are not read."""
    if tasks is not None:
        from pipeline.tasks.catalog import task_names

        task_names(tasks)


if __name__ == "__main__":
    resume = "goes on from the newest checkpoint, if there is one"
    run(PretrainConfig, main, section="pretrain", resume=resume, describe=describe)
