"""Token files of others to data: ``python jobs/import_shards.py --train GLOB --val GLOB --output FOLDER``; see --help.

Takes the .bin files of llm.c and modded-nanogpt, and with --headerless those of nanoGPT. The same command again goes on
where it stopped, or says that the data are ready.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config.data import ImportShardsConfig


def main(config: ImportShardsConfig) -> None:
    from pipeline.paths import resolve_output
    from pipeline.preprocessing import import_job

    report, mlflow_run, was_there = import_job.import_shards(config)
    print_table(
        f"import_shards: {'done before' if was_there else 'done'}",
        [
            ("files", f"{report.files:,}, {report.seconds:,.0f} s"),
            ("tokens", f"{report.train_tokens:,} train, {report.val_tokens:,} val"),
            ("documents", f"{report.documents:,} ({report.text_megabytes:,.1f} MB of text)"),
            ("vocabulary", f"{report.vocab_size:,} ids, {report.bytes_per_token:.2f} bytes per token"),
            ("output", str(resolve_output(config.output))),
            ("MLflow", mlflow_run.location),
        ],
    )


if __name__ == "__main__":
    run(ImportShardsConfig, main, section="import_shards", resume="goes on with the files that are not imported yet")
