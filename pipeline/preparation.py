"""What jobs/tokenize.py calls: shards made or found, figures noted beside them, the run in MLflow.

Figures that differ from run to run (seconds, speed) lie in ``<output>/summary.json`` and in MLflow, never in the
manifest, whose bytes depend on input, tokenizer and settings alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline import cluster, stages
from pipeline.config import TokenizeConfig, to_dict
from pipeline.shards import Manifest
from pipeline.tracking import MLflowRun, MLflowTracker, RunInput, open_run
from pipeline.trainer import SUMMARY_FILE


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """A finished data set in figures."""

    documents: int
    text_megabytes: float
    """UTF-8, 1 MB = 10^6 bytes."""
    train_tokens: int
    val_tokens: int
    vocab_size: int
    skipped: dict[str, int]
    """Reason -> documents left out."""
    megabytes_per_second: float
    """Text read, encoded and written per second over all workers, in the run that finished the data."""
    seconds: float
    """Of that run, training a tokenizer included."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_megabytes * 1e6 / (self.train_tokens + self.val_tokens)


def tokenize(config: TokenizeConfig) -> tuple[DataReport, MLflowRun, bool]:
    """Make the shards, or find them made; returns figures, MLflow run, and whether they were there already."""
    output = cluster.resolve_path(config.output)
    config = _with_absolute_inputs(config)
    report_file = output / SUMMARY_FILE
    manifest = stages.finished(config, output)
    done = manifest is not None and report_file.is_file()
    cluster.make_output(output)
    run = open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=output,
        working_folder=cluster.working_folder(),
        job="tokenize",
        reopen=not done,
    )
    if done:
        return DataReport(**json.loads(report_file.read_text(encoding="utf-8"))), run, True
    cluster.connect(num_cpus=config.num_workers or os.cpu_count() or 1)
    if config.num_workers:
        cluster.require(num_workers=config.num_workers, gpus=False)
    report, manifest = _run(config, output)
    report_file.write_text(json.dumps(dataclasses.asdict(report), indent=2), encoding="utf-8")
    _track(config, run, output, report, manifest)
    return report, run, False


def _run(config: TokenizeConfig, output: Path) -> tuple[DataReport, Manifest]:
    summary = stages.tokenize(config, output)
    manifest = summary.manifest
    report = DataReport(
        documents=manifest.documents("train") + manifest.documents("val"),
        text_megabytes=(manifest.text_bytes("train") + manifest.text_bytes("val")) / 1e6,
        train_tokens=manifest.tokens("train"),
        val_tokens=manifest.tokens("val"),
        vocab_size=manifest.vocab_size,
        skipped=manifest.skipped,
        megabytes_per_second=summary.text_bytes / 1e6 / summary.encode_seconds if summary.encode_seconds else 0.0,
        seconds=summary.seconds,
    )
    return report, manifest


def _track(config: TokenizeConfig, run: MLflowRun, output: Path, report: DataReport, manifest: Manifest) -> None:
    tracker = MLflowTracker(run)
    tracker.log_params(to_dict(config))
    tracker.log_inputs(
        [
            RunInput(name=output.name, fingerprint=manifest.fingerprint, source=config.source, context="data"),
            RunInput(
                name="tokenizer",
                fingerprint=manifest.tokenizer_fingerprint,
                source=str(output / "tokenizer.json"),
                context="tokenizer",
            ),
        ]
    )
    figures = {name: value for name, value in dataclasses.asdict(report).items() if isinstance(value, int | float)}
    skipped = {f"skipped/{reason}": count for reason, count in report.skipped.items()}
    tracker.log_metrics({**figures, "bytes_per_token": report.bytes_per_token, **skipped}, step=0)
    tracker.log_file(output / "manifest.json")
    tracker.log_file(output / "tokenizer.json")
    tracker.finish("FINISHED")


def _with_absolute_inputs(config: TokenizeConfig) -> TokenizeConfig:
    """Local paths made absolute, because workers run in other folders; addresses and installed-docs stay."""
    tokenizer = str(cluster.resolve_path(config.tokenizer)) if config.tokenizer else None
    return dataclasses.replace(config, source=absolute_source(config.source), tokenizer=tokenizer)


def absolute_source(source: str) -> str:
    """A source as every worker finds it."""
    is_local = "://" not in source and source != "installed-docs"
    return str(cluster.resolve_path(source)) if is_local else source
