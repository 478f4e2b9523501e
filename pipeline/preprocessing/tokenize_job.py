"""The job of jobs/tokenize.py: shards are made or found, and their figures go to summary.json and MLflow.

Figures that differ from run to run (seconds, speed) are not in the manifest, whose bytes depend on input, tokenizer and
settings alone.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.data import TokenizeConfig
from pipeline.console import CountProgress
from pipeline.dataset import verification
from pipeline.dataset.dataset import load_tokenizer_of
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.filters.report import Sample, render
from pipeline.paths import resolve_output, resolve_output_file, resolve_path
from pipeline.preprocessing import resume_state, tokenization
from pipeline.preprocessing.data_job import log_data, log_figures, report_json, run_job
from pipeline.preprocessing.planning import filter_rules, sample_documents
from pipeline.preprocessing.tokenization import DataReport
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.plan import with_address
from pipeline.sources.sources import resolve_source
from pipeline.storage.folders import Folder
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.tracking.tracker import Tracker

_SAMPLE_BYTES = 16_000_000  # of text, which all the rules look at in a few seconds

logger = logging.getLogger(__name__)


def tokenize(config: TokenizeConfig) -> tuple[DataReport, MLflowRun, bool]:
    """Make the shards unless they exist; returns figures, MLflow run, and whether they existed already."""
    tokenizer = str(resolve_path(config.tokenizer)) if config.tokenizer else None  # workers run in other folders
    config = dataclasses.replace(config, source=resolve_source(config.source), tokenizer=tokenizer)
    given = tokenization.given_tokenizer(config)

    def make(output: Folder) -> DataReport:
        report = tokenization.tokenize(config, output, given)
        output.write(SUMMARY_FILE, [report_json(report)])
        return report

    done = run_job(
        config,
        "tokenize",
        DataReport,
        is_done=lambda output: tokenization.finished(config, output, given) is not None,
        make=make,
        track=functools.partial(_track, config),
    )
    if config.filter_report is not None:
        _write_filter_report(config, config.filter_report, resolve_output(config.output))
    return done


def _write_filter_report(config: TokenizeConfig, path: str, output: Folder) -> None:
    """Write the page about what the rules do to a sample of the source."""
    folder, name = resolve_output_file(path)
    sample = Sample(filter_rules(config))
    items = with_address(resume_state.read_plan(output) or [], config.source)
    sample.add(sample_documents(items, _SAMPLE_BYTES))
    page = render(sample, source=resume_state.stored_source(config.source), counted=Manifest.load(output).skipped)
    folder.write(name, [page.encode("utf-8", "replace")])
    logger.info("%s/%s: what the rules do to %s documents", folder, name, f"{sample.documents:,}")


def verify(config: TokenizeConfig) -> tuple[Manifest, list[str]]:
    """Read the data in --output again; returns their manifest and a sentence for everything that is wrong."""
    output = resolve_output(config.output)
    manifest = Manifest.load(output)
    problems = []
    try:
        load_tokenizer_of(output, manifest)
    except UserError as error:
        problems.append(str(error))
    with CountProgress("verify", "shards", len(manifest.shards)) as progress:
        return manifest, problems + verification.verify(output, progress=progress.add)


def _track(config: TokenizeConfig, output: Folder, report: DataReport, tracker: Tracker) -> None:
    manifest = Manifest.load(output)
    log_data(tracker, output, manifest, config.source)
    log_figures(tracker, report, bytes_per_token=report.bytes_per_token)
    with tempfile.TemporaryDirectory() as temporary:
        tracker.log_file(_draw_lengths(manifest.document_lengths, Path(temporary) / "document_lengths.png"))


def _draw_lengths(counts: Sequence[int], path: Path) -> Path:
    """Draw the number of documents of 2**i to 2**(i + 1) - 1 bytes, for every i."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.stairs(counts, [2.0**power for power in range(len(counts) + 1)], fill=True)
    axis.set(xlabel="length of a document (bytes of UTF-8)", ylabel="documents")
    axis.set_xscale("log", base=2)
    figure.savefig(path)
    return path
