"""What the jobs that read text have in common: a locked output folder, an MLflow run, Ray, and the figures in both."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.cluster import ray_cluster
from pipeline.config.data import ReadingConfig
from pipeline.config.settings import to_dict
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.paths import resolve_output, working_folder
from pipeline.storage.folders import Folder
from pipeline.storage.locks import exclusive_output
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import RunInput, Tracker


class JobConfig(Protocol):
    """Settings of a job with an output folder and an MLflow run."""

    @property
    def output(self) -> str:
        """Folder that the job writes to."""

    @property
    def tracking_uri(self) -> str | None:
        """MLflow server or store."""

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""


class Report(Protocol):
    """A dataclass of figures."""

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> documents left out."""


ReportT = TypeVar("ReportT")


def run_job(
    config: ReadingConfig,
    name: str,
    *,
    find: Callable[[Folder], ReportT | None],
    make: Callable[[Folder], ReportT],
    track: Callable[[Folder, ReportT, Tracker], None],
) -> tuple[ReportT, MLflowRun, bool]:
    """``run_tracked``, with ``make`` on a Ray that is initialised."""

    def make_on_ray(output: Folder) -> ReportT:
        ray_cluster.connect(num_cpus=config.num_workers or os.cpu_count() or 1)
        if config.num_workers:
            ray_cluster.require(num_workers=config.num_workers, gpus=False)
        return make(output)

    return run_tracked(config, name, find=find, make=make_on_ray, track=track)


def run_tracked(
    config: JobConfig,
    name: str,
    *,
    find: Callable[[Folder], ReportT | None],
    make: Callable[[Folder], ReportT],
    track: Callable[[Folder, ReportT, Tracker], None],
) -> tuple[ReportT, MLflowRun, bool]:
    """Run a job in its output folder, unless it is done already.

    Args:
        config: settings of the job.
        name: the verb, as of ``jobs/<name>.py``.
        find: returns the report of a job that is done; needs no Ray.
        make: does the work and returns its report.
        track: logs what is particular to the job.

    Returns:
        The report, the MLflow run, and whether the job was done already.
    """
    output = resolve_output(config.output)
    with exclusive_output(output):
        report = find(output)
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
        report = make(output)
        tracker = MLflowTracker(run)
        tracker.log_params(to_dict(config))
        track(output, report, tracker)
        tracker.finish("FINISHED")
        return report, run, False


def report_json(report: Any) -> bytes:
    """The content of summary.json, from a dataclass of figures."""
    return json.dumps(dataclasses.asdict(report), indent=2).encode()


def log_figures(tracker: Tracker, report: Report, more: dict[str, float]) -> None:
    """Log every number of a report, the skipped documents by reason, and ``more`` figures."""
    figures = {name: value for name, value in vars(report).items() if isinstance(value, int | float)}
    skipped = {f"skipped/{reason}": count for reason, count in report.skipped.items()}
    tracker.log_metrics({**figures, **more, **skipped}, step=0)


def log_files(tracker: Tracker, output: Folder, *names: str) -> None:
    """Log copies of files of the output folder, which may be in a bucket."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            path = Path(temporary) / name
            path.write_bytes(output.read(name))
            tracker.log_file(path)


def tokenizer_input(output: Folder, fingerprint: str) -> RunInput:
    """The tokenizer of the output folder, as an input of the MLflow run."""
    source = f"{output}/{TOKENIZER_NAME}"
    return RunInput(name="tokenizer", fingerprint=fingerprint, source=source, context="tokenizer")
