"""The job of jobs/finetune.py: conversations are packed unless they are, and the model is trained on them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from model.config import ModelConfig
from pipeline.config.finetuning import FinetuneConfig
from pipeline.config.training import PretrainConfig
from pipeline.conversations import packed_data
from pipeline.conversations.packed_data import ConversationReport, Recipe
from pipeline.conversations.templates import TEMPLATES, with_chat_tokens
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.paths import resolve_output
from pipeline.preprocessing.data_job import log_data, log_figures, report_json, run_job
from pipeline.pretrained import weights
from pipeline.pretrained.resolve import read_tokenizer, resolve_checkpoint
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.sources import resolve_source
from pipeline.storage.folders import Folder
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.tracking.tracker import Tracker
from pipeline.training import launch
from pipeline.training.run_folder import RunSummary

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a run of the job has done."""

    data: ConversationReport
    training: RunSummary
    run: MLflowRun
    config: PretrainConfig
    """The settings that the model was trained with."""


def finetune(config: FinetuneConfig) -> Finetuned:
    """Pack the conversations, then train; what is done already is not done again.

    Raises:
        RunStopped: SIGTERM or Ctrl-C asked for the end, and a checkpoint is saved.
        UserError: an error that the user can mend.
    """
    path = resolve_checkpoint(config.checkpoint)
    recipe = _recipe(config, path)
    data = prepare(recipe)
    manifest = Manifest.load(resolve_output(config.data))
    length = recipe.context_length + 1
    model_config = weights.read_model_config(path)
    _announce_tokens(recipe, model_config)
    training = config.training(model_config, num_windows=manifest.tokens("train") // length)
    training = dataclasses.replace(training, checkpoint=str(path))
    summary, run = launch.pretrain(training)
    return Finetuned(data=data, training=summary, run=run, config=training)


def prepare(recipe: Recipe) -> ConversationReport:
    """The windows of a recipe, made unless they are there, with an MLflow run of their own."""

    def make(output: Folder) -> ConversationReport:
        report = packed_data.make(recipe, output)
        output.write(SUMMARY_FILE, [report_json(report)])
        return report

    def track(output: Folder, report: ConversationReport, tracker: Tracker) -> None:
        log_data(tracker, output, Manifest.load(output), recipe.config.source)
        log_figures(tracker, report)

    report, _, _ = run_job(
        recipe.config,
        "finetune",
        ConversationReport,
        is_done=lambda output: packed_data.finished(recipe, output) is not None,
        make=make,
        track=track,
    )
    for reason, sentence in report.first_skipped.items():
        logger.warning("%s conversations left out (%s); the first: %s", report.skipped[reason], reason, sentence)
    return report


def _recipe(config: FinetuneConfig, path: Path) -> Recipe:
    """How the windows are made for the model in the folder ``path``."""
    base, model = read_tokenizer(path), weights.read_model_config(path)
    if base.vocab_size != model.vocab_size:
        raise UserError(
            f"{path} has a tokenizer of {base.vocab_size:,} ids and a model of {model.vocab_size:,}, so the ids of the "
            "chat's tokens would be taken; fine-tune a model whose ids all have tokens"
        )
    tokenizer = with_chat_tokens(base, config.chat_template)
    reading = packed_data.reading_config(config)
    return Recipe(
        config=dataclasses.replace(reading, source=resolve_source(reading.source)),
        chat_template=config.chat_template,
        context_length=config.context_length or model.context_length,
        tokenizer=tokenizer,
        base_fingerprint=base.fingerprint,
    )


def _announce_tokens(recipe: Recipe, model: ModelConfig) -> None:
    """Say which ids the tokens of the chat have, and whether the embedding has rows for them."""
    tokenizer, padded = recipe.tokenizer, model.padded_vocab_size
    names = TEMPLATES[recipe.chat_template].special_tokens
    shown = ", ".join(f"{name} {tokenizer.special_tokens[name]:,}" for name in names)
    room = "within" if tokenizer.vocab_size <= padded else "which become more than"
    logger.info("tokens of the chat: %s, %s the %s rows of the embedding", shown, room, f"{padded:,}")
