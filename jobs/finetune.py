"""A trained model to one that chats: ``python jobs/finetune.py --checkpoint RUN --source CONVERSATIONS``; see --help.

Conversations are packed into windows first, unless they are there; then the model is trained on what the assistant
says in them. The same command again goes on where it stopped, or says that the run is done.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import Rows, print_table, run, would_fail
from pipeline.config.finetuning import FinetuneConfig


def main(config: FinetuneConfig) -> None:
    from pipeline.conversations import finetune_job
    from pipeline.evaluation.validation import perplexity_text
    from pipeline.paths import resolve_output

    done = finetune_job.finetune(config)
    data, summary = done.data, done.training
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in data.skipped.items()) or "none"
    val_rows = [("val loss", "none (--val_every 0)")]
    if summary.val_loss is not None:
        perplexity = perplexity_text(summary.val_loss)
        val_rows = [("val loss", f"{summary.val_loss:.4f} on {summary.val_tokens:,} tokens, perplexity {perplexity}")]
    if summary.val_accuracy is not None:
        val_rows.append(("accuracy", f"{summary.val_accuracy:.1%} of these tokens are the likeliest"))
    print_table(
        "finetune: done",
        [
            ("conversations", f"{data.conversations:,} ({data.text_megabytes:,.1f} MB; skipped: {skipped})"),
            *(("left out", f"{sentence} (the first {reason})") for reason, sentence in data.first_skipped.items()),
            ("windows", f"{data.train_windows:,} train, {data.val_windows:,} val"),
            ("learned", f"{data.learned_tokens:,} tokens, {data.learned_share:.1%} of those in the windows"),
            ("steps", f"{summary.steps:,} ({summary.tokens_seen:,} tokens)"),
            ("train loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}"),
            *val_rows,
            ("speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
            ("sample", repr(summary.sample)),
            ("checkpoint", summary.checkpoint),
            ("data", str(resolve_output(config.data))),
            ("MLflow", done.run.location),
        ],
    )


def describe(config: FinetuneConfig) -> Rows:
    """What --dry_run says besides the settings: the mistakes that end the job before Ray starts."""
    from pipeline.cluster.ray_cluster import require_device
    from pipeline.conversations.packed_data import reading_config
    from pipeline.preprocessing.data_job import check_source

    return would_fail(lambda: require_device(config.device), lambda: check_source(reading_config(config)))


if __name__ == "__main__":
    resume = "goes on with the conversations that are not packed yet, or from the newest checkpoint"
    run(FinetuneConfig, main, section="finetune", resume=resume, describe=describe)
