"""Raw text to a tokenizer: ``python jobs/train_tokenizer.py --source FILES --output FOLDER``; --help lists the flags.

The same command again says that the tokenizer is there. It is for ``python jobs/tokenize.py --tokenizer FILE``.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import Rows, ignored_row, print_table, run, would_fail
from pipeline.config.data import TrainTokenizerConfig
from pipeline.console import format_rate


def main(config: TrainTokenizerConfig) -> None:
    from pipeline.paths import resolve_output
    from pipeline.preprocessing import train_tokenizer_job

    report, mlflow_run, was_there = train_tokenizer_job.train_tokenizer(config)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items()) or "none"
    special_tokens = ", ".join(config.special_tokens) or "none"
    print_table(
        f"train_tokenizer: {'done before' if was_there else 'done'}",
        [
            ("documents", f"{report.documents:,} ({report.text_megabytes:,.1f} MB; skipped: {skipped})"),
            *ignored_row(report.ignored),
            ("distinct pre-tokens", f"{report.distinct_pretokens:,}, cut by the {config.pattern} pattern"),
            ("vocabulary", f"{report.vocab_size:,} ids: 256 bytes, {report.merges:,} merges, {special_tokens}"),
            (
                "counting",
                f"{report.count_seconds:,.1f} s, {format_rate(report.megabytes_per_second * 1e6)} from source on",
            ),
            ("merging", f"{report.merge_seconds:,.1f} s"),
            ("output", str(resolve_output(config.output))),
            ("MLflow", mlflow_run.location),
        ],
    )


def describe(config: TrainTokenizerConfig) -> Rows:
    """What --dry_run says besides the settings: the mistakes that end the job before Ray starts."""
    from pipeline.paths import resolve_output
    from pipeline.preprocessing.data_job import check_source
    from pipeline.run_files import SUMMARY_FILE

    return would_fail(lambda: check_source(config), lambda: resolve_output(config.output).size(SUMMARY_FILE))


if __name__ == "__main__":
    run(TrainTokenizerConfig, main, section="train_tokenizer", resume="counts the text again", describe=describe)
