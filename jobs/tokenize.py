"""Raw text to shards: ``python jobs/tokenize.py --config configs/demo.yaml``; --help lists the flags.

The same command again goes on where it stopped, or says that the data are ready.
"""

import os
import sys

# Python puts jobs/ first on the path, where this file would shadow the standard library's module of the same name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config import TokenizeConfig


def main(config: TokenizeConfig) -> None:
    from pipeline import cluster, preparation

    report, mlflow_run, was_there = preparation.tokenize(config)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items()) or "none"
    print_table(
        f"tokenize: {'done before' if was_there else 'done'}",
        [
            ("documents", f"{report.documents:,} ({report.text_megabytes:,.1f} MB; skipped: {skipped})"),
            ("tokens", f"{report.train_tokens:,} train, {report.val_tokens:,} val"),
            ("vocabulary", f"{report.vocab_size:,} ids, {report.bytes_per_token:.2f} bytes per token"),
            ("speed", f"{report.megabytes_per_second:,.1f} MB/s, {report.seconds:,.0f} s in all"),
            ("output", str(cluster.resolve_path(config.output))),
            ("MLflow", mlflow_run.location),
        ],
    )


if __name__ == "__main__":
    run(TokenizeConfig, main, section="tokenize", resume="goes on with the work items that are not finished")
