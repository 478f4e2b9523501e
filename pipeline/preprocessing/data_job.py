"""What the jobs that read text have in common: a locked output folder, an MLflow run, Ray, and the figures in both."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.cluster import ray_cluster
from pipeline.config.data import ImportShardsConfig, ReadingConfig
from pipeline.config.settings import to_dict
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.dataset.manifest import MANIFEST_NAME, Manifest
from pipeline.errors import UserError
from pipeline.paths import resolve_output, working_folder
from pipeline.preprocessing.planning import document_rules
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.readers import read_item
from pipeline.sources.sources import INSTALLED_DOCS, find
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import Folder, LocalFolder
from pipeline.storage.json_files import read_json
from pipeline.storage.locks import exclusive_output
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import RunInput, Tracker, log_files

ReportT = TypeVar("ReportT")


def run_job(
    config: ReadingConfig | ImportShardsConfig,
    name: str,
    report_type: type[ReportT],
    *,
    is_done: Callable[[Folder], bool],
    make: Callable[[Folder], ReportT],
    track: Callable[[Folder, ReportT, Tracker], None],
) -> tuple[ReportT, MLflowRun, bool]:
    """Run a job in its output folder, unless it is done already.

    Args:
        config: settings of the job.
        name: the verb, as of ``jobs/<name>.py``.
        report_type: dataclass of the job's figures, which are read from summary.json where the job is done.
        is_done: whether all but the report is there; needs no Ray.
        make: does the work, writes summary.json and returns its report; for a job that reads text, Ray is initialised.
        track: logs what is particular to the job.

    Returns:
        The report, the MLflow run, and whether the job was done already.
    """
    output = resolve_output(config.output)
    if isinstance(config, ReadingConfig):
        _require_apart(config.source, output)
    with exclusive_output(output):
        mend = "delete it and run the same command again"
        report = read_json(output, SUMMARY_FILE, report_type, mend=mend) if is_done(output) else None
        if report is None and isinstance(config, ReadingConfig):
            check_source(config)
        output.make()
        run = open_run(
            tracking_uri=config.tracking_uri,
            experiment=config.experiment,
            folder=output,
            working_folder=working_folder(),
            job=name,
            reopen=report is None,
        )
        if report is not None:
            return report, run, True
        if isinstance(config, ReadingConfig):
            ray_cluster.connect(num_cpus=config.num_workers or os.cpu_count() or 1)
            if config.num_workers:
                ray_cluster.require(num_workers=config.num_workers, gpus=False)
        report = make(output)
        tracker = MLflowTracker(run)
        tracker.log_params(to_dict(config))
        track(output, report, tracker)
        tracker.finish("FINISHED")
        return report, run, False


def _require_apart(source: str, output: Folder) -> None:
    """Raise UserError where the source is the very folder that the job is about to write to."""
    is_same = source.rstrip("/") == str(output)
    if isinstance(output, LocalFolder) and "://" not in source:
        is_same = Path(source).expanduser().resolve() == output.path.resolve()
    if is_same:
        raise UserError(f"--source and --output are both {output}; choose another --output")


def check_source(config: ReadingConfig) -> None:
    """Raise UserError where a source of this machine is missing, or its first file has no text, before Ray starts.

    Of JSON lines the first is read. All other files, and sources elsewhere, are looked at by the plan.
    """
    if "://" in config.source or config.source == INSTALLED_DOCS:
        return
    layouts = find(config.source).layouts(config.text_column, has_separator=config.document_separator is not None)
    first = None if config.skip_bad_files else next(iter(layouts), None)
    if first is not None and first.whole.kind == "jsonl" and not config.skip_bad_records:
        line = dataclasses.replace(first.whole, start=0, stop=int(first.bounds[-1]), max_documents=1)
        item = WorkItem(index=0, slices=(line,), text_column=config.text_column, rules=document_rules(config))
        next(read_item(item, Counter()), None)


def report_json(report: Any) -> bytes:
    """The content of summary.json, from a dataclass of figures."""
    return json.dumps(dataclasses.asdict(report), indent=2).encode()


def log_figures(tracker: Tracker, report: Any, **more: float) -> None:
    """Log every number of a report, the skipped documents by reason, and ``more`` figures.

    They are tags: of a metric with a single point MLflow would draw a chart.
    """
    figures = {name: value for name, value in vars(report).items() if isinstance(value, int | float)}
    skipped = {f"skipped/{reason}": count for reason, count in getattr(report, "skipped", {}).items()}
    tracker.log_tags({name: str(round(value, 3)) for name, value in {**figures, **more, **skipped}.items()})


def log_data(tracker: Tracker, output: Folder, manifest: Manifest, source: str) -> None:
    """Log the shards of the output folder and their tokenizer as the inputs of the run, with copies of both files."""
    name = output.url.rpartition("/")[2]
    data = RunInput(name=name, fingerprint=manifest.fingerprint, source=source, context="data")
    tracker.log_inputs([data, tokenizer_input(output, manifest.tokenizer_fingerprint)])
    log_files(tracker, output, MANIFEST_NAME, TOKENIZER_NAME)


def tokenizer_input(output: Folder, fingerprint: str) -> RunInput:
    """The tokenizer of the output folder, as an input of the MLflow run."""
    source = f"{output}/{TOKENIZER_NAME}"
    return RunInput(name="tokenizer", fingerprint=fingerprint, source=source, context="tokenizer")
