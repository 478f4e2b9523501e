"""The job of jobs/train_tokenizer.py: a tokenizer is made or found, and its figures go to summary.json and MLflow.

``tokenizer.json`` depends on the input and on the settings that ``_settings_of`` names, not on the number of workers or
the size of work items. ``summary.json`` is written after it, so a folder with both is done. An interrupted run counts
again from the start.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pipeline.config.data import TrainTokenizerConfig
from pipeline.dataset.dataset import TOKENIZER_NAME, load_tokenizer, save_tokenizer
from pipeline.errors import UserError
from pipeline.preprocessing import resume_state
from pipeline.preprocessing.data_job import log_figures, report_json, run_job, tokenizer_input
from pipeline.preprocessing.tokenizer_training import TrainingReport, learn
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.sources import resolve_source
from pipeline.storage.folders import Folder
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.tracking.tracker import RunInput, Tracker, log_files

logger = logging.getLogger(__name__)


def train_tokenizer(config: TrainTokenizerConfig) -> tuple[TrainingReport, MLflowRun, bool]:
    """Make the tokenizer unless it exists; returns figures, MLflow run, and whether it existed already.

    Raises UserError for what the user can mend, an output folder of other settings or other input among it.
    """
    config = dataclasses.replace(config, source=resolve_source(config.source))

    return run_job(
        config,
        "train_tokenizer",
        TrainingReport,
        is_done=functools.partial(_is_done, config),
        make=functools.partial(train_into, config),
        track=functools.partial(_track, config),
    )


def _is_done(config: TrainTokenizerConfig, output: Folder) -> bool:
    names = (TOKENIZER_NAME, SUMMARY_FILE)
    if resume_state.read_run(output) is None and any(output.size(name) is not None for name in names):
        raise UserError(f"output folder {output} holds files of unknown origin; choose another --output")
    is_complete = resume_state.is_complete(output, config.source, _settings_of(config), names=names)
    return is_complete and _has_its_tokenizer(output)


def _has_its_tokenizer(output: Folder) -> bool:
    """Whether tokenizer.json is the one that summary.json is about."""
    try:
        is_same = load_tokenizer(output).fingerprint == json.loads(output.read(SUMMARY_FILE))["fingerprint"]
    except UserError as error:
        logger.warning("%s; it is trained again", error)
        return False
    if not is_same:
        logger.warning("%s/%s is another tokenizer than the one trained; it is trained again", output, TOKENIZER_NAME)
    return is_same


def train_into(config: TrainTokenizerConfig, output: Folder) -> TrainingReport:
    """Train, and write both files to ``output``. Ray must be initialised by the caller."""
    source, _ = resume_state.begin(output, config.source, _settings_of(config))
    for name in (SUMMARY_FILE, TOKENIZER_NAME):
        output.delete(name)  # left by a run that ended between the two
    tokenizer, report = learn(config, source, output)
    save_tokenizer(output, tokenizer)
    output.write(SUMMARY_FILE, [report_json(report)])
    return report


def _settings_of(config: TrainTokenizerConfig) -> dict[str, Any]:
    """The settings that a tokenizer depends on, as they are read back from JSON."""
    names = ("vocab_size", "min_frequency", "pattern", "sample_bytes", "text_column", "val_fraction")
    values = {name: getattr(config, name) for name in names} | resume_state.later_settings(config)
    return values | {"special_tokens": list(config.special_tokens)}


def _track(config: TrainTokenizerConfig, output: Folder, report: TrainingReport, tracker: Tracker) -> None:
    record = resume_state.read_run(output)
    assert record is not None
    inputs = json.dumps([entry.manifest_entry() for entry in record.inputs], sort_keys=True)
    data = RunInput(
        name=Path(resume_state.stored_source(config.source)).name or config.source,
        fingerprint=hashlib.sha256(inputs.encode()).hexdigest(),
        source=config.source,
        context="data",
    )
    tracker.log_inputs([data, tokenizer_input(output, report.fingerprint)])
    log_figures(tracker, report, megabytes_per_second=report.megabytes_per_second)
    log_files(tracker, output, TOKENIZER_NAME)
