"""Raw text to shards: ``python jobs/tokenize.py --config configs/demo.yaml``; --help lists the flags.

The same command again goes on where it stopped, or says that the data are ready. With --verify nothing is made: the
data in --output are read again and compared with their manifest.
"""

import os
import sys

# Python puts jobs/ first on the path, where this file would shadow the standard library's module of the same name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import Rows, ignored_row, print_table, run, would_fail
from pipeline.config.data import TASKS, TokenizeConfig
from pipeline.console import format_rate
from pipeline.errors import UserError

_SHOWN_PROBLEMS = 20


def main(config: TokenizeConfig) -> None:
    from pipeline.paths import resolve_output
    from pipeline.preprocessing import tokenize_job

    if config.verify:
        _verify(config)
        return
    report, mlflow_run, was_there = tokenize_job.tokenize(config)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items()) or "none"
    damaged = [("damaged", f"{report.damaged:,} inputs could not be read whole; manifest.json lists them")]
    print_table(
        f"tokenize: {'done before' if was_there else 'done'}",
        [
            ("documents", f"{report.documents:,} ({report.text_megabytes:,.1f} MB; skipped: {skipped})"),
            *(("left out", f"{sentence} (the first {reason})") for reason, sentence in report.first_skipped.items()),
            *(damaged if report.damaged else []),
            *_contaminated(report.skipped),
            *ignored_row(report.ignored),
            ("tokens", f"{report.train_tokens:,} train, {report.val_tokens:,} val"),
            *_missing(report.train_tokens, report.val_tokens),
            ("vocabulary", f"{report.vocab_size:,} ids, {report.bytes_per_token:.2f} bytes per token"),
            ("speed", f"{format_rate(report.megabytes_per_second * 1e6)}, {report.seconds:,.0f} s in all"),
            ("output", str(resolve_output(config.output))),
            ("MLflow", mlflow_run.location),
        ],
    )


def _contaminated(skipped: dict[str, int]) -> Rows:
    """A row about documents that hold an evaluation question, if there are any."""
    from pipeline.decontamination.documents import LIST_NAME, REASON

    count = skipped.get(REASON, 0)
    return [(REASON, f"{count:,} documents hold a question; {LIST_NAME} lists them")] if count else []


def _missing(train_tokens: int, val_tokens: int) -> list[tuple[str, str]]:
    """Rows about splits without a document."""
    rows = []
    if not train_tokens:
        rows.append(("note", "all documents are held out: there is nothing to train on; lower --val_fraction"))
    if not val_tokens:
        how = "raise --val_fraction or give --val_split tail, or train with --val_every 0"
        rows.append(("note", f"no document is held out, so jobs/pretrain.py has nothing to validate on: {how}"))
    return rows


def _verify(config: TokenizeConfig) -> None:
    from pipeline.paths import resolve_output
    from pipeline.preprocessing import tokenize_job

    manifest, problems = tokenize_job.verify(config)
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(problem, file=sys.stderr)
    if problems:
        raise UserError(
            f"{len(problems):,} things are wrong with {resolve_output(config.output)}; delete the "
            "files named and run the command again without --verify"
        )
    print_table(
        "verify: nothing is wrong",
        [
            ("shards", f"{len(manifest.shards):,}, checksums, counts and ids as the manifest says"),
            ("tokens", f"{manifest.tokens('train'):,} train, {manifest.tokens('val'):,} val"),
            ("output", str(resolve_output(config.output))),
        ],
    )


def describe(config: TokenizeConfig) -> Rows:
    """What --dry_run says besides the settings: the mistakes that would end the job, or what the work takes."""
    from pipeline.decontamination.evaluation_sets import EvaluationSets
    from pipeline.decontamination.questions import check_names
    from pipeline.estimation.dry_run import describe_work
    from pipeline.paths import resolve_output
    from pipeline.preprocessing.data_job import check_source
    from pipeline.run_files import SUMMARY_FILE

    tasks = [name for name in config.decontaminate if name.startswith(TASKS)]
    here = [name for name in config.decontaminate if "://" not in name and name not in tasks]
    mistakes = would_fail(
        lambda: check_source(config),
        lambda: EvaluationSets.read(here),
        lambda: check_names(tasks),
        lambda: resolve_output(config.output).size(SUMMARY_FILE),
    )
    rows: Rows = []
    if not mistakes and not config.verify:
        mistakes = would_fail(lambda: rows.extend(describe_work(config)))
    return [*mistakes, *rows]


if __name__ == "__main__":
    run(
        TokenizeConfig,
        main,
        section="tokenize",
        resume="goes on with the work items that are not finished",
        describe=describe,
    )
