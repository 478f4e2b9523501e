"""What jobs/tokenize.py calls: shards made or found, figures noted beside them, the run in MLflow.

Figures that differ from run to run (seconds, speed) lie in ``<output>/summary.json`` and in MLflow, never in the
manifest, whose bytes depend on input, tokenizer and settings alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import ray_cluster
from pipeline.config.data import TokenizeConfig
from pipeline.config.settings import to_dict
from pipeline.console import CountProgress
from pipeline.dataset import verification
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.dataset.manifest import MANIFEST_NAME, Manifest
from pipeline.paths import resolve_output, resolve_path, working_folder
from pipeline.preprocessing import tokenization
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.sources import resolve_source
from pipeline.storage.folders import Folder
from pipeline.storage.locks import exclusive_output
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import RunInput


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
    damaged: int = 0
    """Inputs of which something could not be read (--skip_bad_files); the manifest lists them."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_megabytes * 1e6 / (self.train_tokens + self.val_tokens)


def tokenize(config: TokenizeConfig) -> tuple[DataReport, MLflowRun, bool]:
    """Make the shards, or find them made; returns figures, MLflow run, and whether they were there already."""
    output = resolve_output(config.output)
    with exclusive_output(output):
        return _tokenize(_with_absolute_inputs(config), output)


def _tokenize(config: TokenizeConfig, output: Folder) -> tuple[DataReport, MLflowRun, bool]:
    manifest = tokenization.finished(config, output)
    report = _read_report(output) if manifest is not None else None
    output.make()
    run = open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=output,
        working_folder=working_folder(),
        job="tokenize",
        reopen=report is None,
    )
    if report is not None:
        return report, run, True
    ray_cluster.connect(num_cpus=config.num_workers or os.cpu_count() or 1)
    if config.num_workers:
        ray_cluster.require(num_workers=config.num_workers, gpus=False)
    report, manifest = _run(config, output)
    output.write(SUMMARY_FILE, [json.dumps(dataclasses.asdict(report), indent=2).encode()])
    _track(config, run, output, report, manifest)
    return report, run, False


def verify(config: TokenizeConfig) -> tuple[Manifest, list[str]]:
    """Read the data in --output again; returns their manifest and a sentence for everything that is wrong."""
    output = resolve_output(config.output)
    manifest = Manifest.load(output)
    with CountProgress("verify", "shards", len(manifest.shards)) as progress:
        return manifest, verification.verify(output, progress=progress.add)


def _read_report(output: Folder) -> DataReport | None:
    try:
        return DataReport(**json.loads(output.read(SUMMARY_FILE)))
    except FileNotFoundError:
        return None


def _run(config: TokenizeConfig, output: Folder) -> tuple[DataReport, Manifest]:
    summary = tokenization.tokenize(config, output)
    manifest = summary.manifest
    report = DataReport(
        documents=manifest.documents("train") + manifest.documents("val"),
        text_megabytes=(manifest.text_bytes("train") + manifest.text_bytes("val")) / 1e6,
        train_tokens=manifest.tokens("train"),
        val_tokens=manifest.tokens("val"),
        vocab_size=manifest.vocab_size,
        skipped=manifest.skipped,
        damaged=len(manifest.damaged),
        megabytes_per_second=summary.text_bytes / 1e6 / summary.encode_seconds if summary.encode_seconds else 0.0,
        seconds=summary.seconds,
    )
    return report, manifest


def _track(config: TokenizeConfig, run: MLflowRun, output: Folder, report: DataReport, manifest: Manifest) -> None:
    tracker = MLflowTracker(run)
    tracker.log_params(to_dict(config))
    tracker.log_inputs(
        [
            RunInput(
                name=output.url.rpartition("/")[2],
                fingerprint=manifest.fingerprint,
                source=config.source,
                context="data",
            ),
            RunInput(
                name="tokenizer",
                fingerprint=manifest.tokenizer_fingerprint,
                source=f"{output}/{TOKENIZER_NAME}",
                context="tokenizer",
            ),
        ]
    )
    figures = {name: value for name, value in dataclasses.asdict(report).items() if isinstance(value, int | float)}
    skipped = {f"skipped/{reason}": count for reason, count in report.skipped.items()}
    tracker.log_metrics({**figures, "bytes_per_token": report.bytes_per_token, **skipped}, step=0)
    with tempfile.TemporaryDirectory() as temporary:
        for name in (MANIFEST_NAME, TOKENIZER_NAME):
            path = Path(temporary) / name
            path.write_bytes(output.read(name))
            tracker.log_file(path)
        tracker.log_file(_draw_lengths(manifest.document_lengths, Path(temporary) / "document_lengths.png"))
    tracker.finish("FINISHED")


def _draw_lengths(counts: Sequence[int], path: Path) -> Path:
    """How many documents have 2**i to 2**(i + 1) - 1 bytes, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.stairs(counts, [2.0**power for power in range(len(counts) + 1)], fill=True)
    axis.set(xlabel="length of a document (bytes of UTF-8)", ylabel="documents")
    axis.set_xscale("log", base=2)
    figure.savefig(path)
    return path


def _with_absolute_inputs(config: TokenizeConfig) -> TokenizeConfig:
    """Local paths made absolute, because workers run in other folders."""
    tokenizer = str(resolve_path(config.tokenizer)) if config.tokenizer else None
    return dataclasses.replace(config, source=resolve_source(config.source), tokenizer=tokenizer)
