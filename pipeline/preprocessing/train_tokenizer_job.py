"""What jobs/train_tokenizer.py calls: a tokenizer made or found, figures noted beside it, the run in MLflow.

``tokenizer.json`` depends on the input and on the settings that ``_settings_of`` names, not on the number of workers or
the size of work items. ``summary.json`` is written behind it, so a folder with both is done. An interrupted run counts
again from the start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import ray_cluster
from pipeline.config.data import TrainTokenizerConfig
from pipeline.config.settings import to_dict
from pipeline.dataset.dataset import TOKENIZER_NAME, save_tokenizer
from pipeline.errors import UserError
from pipeline.paths import resolve_output, working_folder
from pipeline.preprocessing import resume_state
from pipeline.preprocessing.resume_state import RunRecord
from pipeline.preprocessing.tokenizer_training import learn
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.sources import resolve_source
from pipeline.storage.folders import Folder
from pipeline.storage.locks import exclusive_output
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import RunInput


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """A finished tokenizer in figures."""

    documents: int
    """Counted."""
    text_megabytes: float
    """Of these, UTF-8, 1 MB = 10^6 bytes."""
    skipped: dict[str, int]
    """Reason -> documents left out."""
    distinct_pretokens: int
    merges: int
    vocab_size: int
    """Ids reached; fewer than asked for where min_frequency is above 1 and the text is short."""
    fingerprint: str
    """Of the tokenizer: sha256, hex."""
    count_seconds: float
    """Reading and counting, with the seconds that Ray takes to start the first tasks."""
    merge_seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """Text read and counted per second, over all workers."""
        return self.text_megabytes / self.count_seconds if self.count_seconds else 0.0


def train_tokenizer(config: TrainTokenizerConfig) -> tuple[TrainingReport, MLflowRun, bool]:
    """Make the tokenizer, or find it made; returns figures, MLflow run, and whether it was there already.

    Raises UserError for what the user can mend, an output folder of other settings or other input among it.
    """
    output = resolve_output(config.output)
    config = dataclasses.replace(config, source=resolve_source(config.source))
    with exclusive_output(output):
        return _train_tokenizer(config, output)


def _train_tokenizer(config: TrainTokenizerConfig, output: Folder) -> tuple[TrainingReport, MLflowRun, bool]:
    names = (TOKENIZER_NAME, SUMMARY_FILE)
    done = resume_state.is_complete(output, config.source, _settings_of(config), names=names)
    if resume_state.read_run(output) is None and any(output.size(name) is not None for name in names):
        raise UserError(f"output folder {output} holds files of unknown origin; choose another --output")
    output.make()
    run = open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=output,
        working_folder=working_folder(),
        job="train_tokenizer",
        reopen=not done,
    )
    if done:
        return TrainingReport(**json.loads(output.read(SUMMARY_FILE))), run, True
    ray_cluster.connect(num_cpus=config.num_workers or os.cpu_count() or 1)
    if config.num_workers:
        ray_cluster.require(num_workers=config.num_workers, gpus=False)
    report, record = train_into(config, output)
    _track(config, run, output, report, record)
    return report, run, False


def train_into(config: TrainTokenizerConfig, output: Folder) -> tuple[TrainingReport, RunRecord]:
    """Train, and write both files to ``output``. Ray must be initialised by the caller."""
    source = resume_state.find_source(config.source, output)
    record = RunRecord(
        source=config.source, pinned=source.pinned, settings=_settings_of(config), inputs=tuple(source.inputs)
    )
    resume_state.claim(output, record)
    for name in (SUMMARY_FILE, TOKENIZER_NAME):
        output.delete(name)  # of a run that ended between the two
    training = learn(config, source, output)
    vocab_size = training.tokenizer.vocab_size
    report = TrainingReport(
        documents=training.documents,
        text_megabytes=training.text_bytes / 1e6,
        skipped=training.skipped,
        distinct_pretokens=training.distinct_pretokens,
        merges=vocab_size - 256 - len(config.special_tokens),
        vocab_size=vocab_size,
        fingerprint=training.tokenizer.fingerprint,
        count_seconds=training.count_seconds,
        merge_seconds=training.merge_seconds,
    )
    save_tokenizer(output, training.tokenizer)
    output.write(SUMMARY_FILE, [json.dumps(dataclasses.asdict(report), indent=2).encode()])
    return report, record


def _settings_of(config: TrainTokenizerConfig) -> dict[str, Any]:
    """What a tokenizer depends on besides the input, as JSON gives it back."""
    names = ("vocab_size", "min_frequency", "pattern", "sample_bytes", "text_column", "val_fraction")
    return {name: getattr(config, name) for name in names} | {"special_tokens": list(config.special_tokens)}


def _track(
    config: TrainTokenizerConfig, run: MLflowRun, output: Folder, report: TrainingReport, record: RunRecord
) -> None:
    inputs = json.dumps([entry.manifest_entry() for entry in record.inputs], sort_keys=True)
    tracker = MLflowTracker(run)
    tracker.log_params(to_dict(config))
    tracker.log_inputs(
        [
            RunInput(
                name=Path(config.source).name or config.source,
                fingerprint=hashlib.sha256(inputs.encode()).hexdigest(),
                source=config.source,
                context="data",
            ),
            RunInput(
                name="tokenizer",
                fingerprint=report.fingerprint,
                source=f"{output}/{TOKENIZER_NAME}",
                context="tokenizer",
            ),
        ]
    )
    figures = {name: value for name, value in dataclasses.asdict(report).items() if isinstance(value, int | float)}
    skipped = {f"skipped/{reason}": count for reason, count in report.skipped.items()}
    tracker.log_metrics({**figures, "megabytes_per_second": report.megabytes_per_second, **skipped}, step=0)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / TOKENIZER_NAME
        path.write_bytes(output.read(TOKENIZER_NAME))
        tracker.log_file(path)
    tracker.finish("FINISHED")
