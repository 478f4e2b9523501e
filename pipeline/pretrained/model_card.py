"""The README.md of an exported model, its report card: data, recipe, curves, scores, samples, cost, origin.

Every figure comes from the run's own folder (journal, evaluation.json) and its checkpoint; what is not known there is
left out. Nothing local gets out: of paths only the last part is shown, and no passwords.
"""

from __future__ import annotations

import functools
import logging
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from typing_extensions import TypedDict

from model.config import ModelConfig
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.reader import read_description
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.training_data import joint_fingerprint, mixture_text
from pipeline.errors import UserError
from pipeline.paths import resolve_output
from pipeline.pretrained import huggingface
from pipeline.pretrained.resolve import ModelSource
from pipeline.redaction import redact
from pipeline.run_files import CURVES_FILE, SCORES_FILE
from pipeline.storage.folders import Folder, as_folder
from pipeline.storage.json_files import DamagedFileError, read_json
from pipeline.tracking.journal import read_journal
from pipeline.tracking.mlflow_run import recorded_run_id
from pipeline.tracking.report import comparison, draw_curves, speed_rows, task_rows
from pipeline.tracking.run_history import RunHistory

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card.md")
_TABLE_ROWS = 12  # of the loss curve
_MOST_SAMPLES = 3  # the last ones
_RECIPE = {
    "optimizer": "optimizer",
    "train_steps": "steps",
    "tokens_per_step": "tokens per step",
    "lr": "highest learning rate",
    "embedding_lr": "highest learning rate of the embedding",
    "output_lr": "highest learning rate of the output matrix",
    "vector_lr": "highest learning rate of vectors",
    "min_lr_fraction": "last learning rate, share of the highest",
    "warmup_fraction": "warm-up, share of the steps",
    "warmup_steps": "warm-up, steps",
    "schedule": "schedule of the learning rate",
    "decay_fraction": "decay, share of the steps",
    "decay_from": "decay, from step",
    "beta1": "AdamW beta1",
    "beta2": "AdamW beta2",
    "eps": "AdamW eps",
    "weight_decay": "weight decay",
    "embedding_weight_decay": "weight decay of embedding and output matrix",
    "grad_clip": "gradient clipping",
    "precision": "precision",
    "packing": "documents in windows (packing)",
    "document_mask": "attention within each document alone",
    "seed": "seed",
}
_SCORES = {
    "val_loss": "val loss, whole val set",
    "document_mask": "val loss with each token seeing its own document alone",
    "perplexity": "val perplexity",
    "bits_per_byte": "val bits per byte",
    "unigram_entropy": "unigram entropy of the val set",
    "hellaswag_acc_norm": "HellaSwag, acc_norm",
    "hellaswag_acc": "HellaSwag, acc",
    "hellaswag_questions": "HellaSwag, questions",
}


class _Scores(TypedDict, total=False):
    """What the card shows of evaluation.json."""

    checkpoint: str
    val_loss: float | None
    document_mask: bool | None
    perplexity: float | None
    bits_per_byte: float | None
    unigram_entropy: float | None
    hellaswag_acc_norm: float | None
    hellaswag_acc: float | None
    hellaswag_questions: int | None
    tasks: dict[str, dict[str, int | float | None]] | None
    core: float | None
    core_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of the run behind a model; of a folder that others made, nothing."""

    info: CheckpointInfo | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version at training, and the project's commit where the checkpoint has it."""
    manifest: Manifest | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    """Content of evaluation.json where it was measured with this checkpoint."""
    history: RunHistory = field(default_factory=RunHistory)
    """The run's journal up to the step of the checkpoint."""
    mlflow_run_id: str | None = None
    old_card: bytes | None = None
    """README.md of a folder in Llama's layout that is exported again."""

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return self.history.metrics.get("train/loss", {})


def read_run(source: ModelSource) -> Run:
    """Read everything that the checkpoint and its run folder say; nothing is asked of MLflow."""
    if huggingface.is_exported(source.path):
        card = source.path / CARD_FILE
        is_kept = card.is_file() and not huggingface.is_published_gpt25(source.path)  # that one speaks of its own code
        return Run(old_card=card.read_bytes() if is_kept else None)
    description = read_description(as_folder(source.path))
    info = description.info
    known = Run(info=info, versions=description.versions, manifest=_read_manifest(info))
    folder = source.run_folder
    if folder is None:
        return known
    history = RunHistory.from_journal(read_journal(folder))
    for name, points in history.metrics.items():
        history.metrics[name] = {step: value for step, value in points.items() if step <= info.step}
    scores = _read_scores(folder, source.address)
    return replace(known, scores=scores, history=history, mlflow_run_id=recorded_run_id(folder))


def write(folder: Path, run: Run, config: ModelConfig, *, name: str, dtype: str, gguf_file: str | None = None) -> None:
    """Write README.md into ``folder``, and curves.png where the run's curves are known.

    Args:
        gguf_file: name of the file of weights, where the folder is for llama.cpp and not for transformers.
    """
    if run.old_card is not None:
        (folder / CARD_FILE).write_bytes(run.old_card)
        return
    curves = draw_curves(run.history)
    if curves is not None:
        (folder / CURVES_FILE).write_bytes(curves)
    card = _template().render(
        name=name,
        dtype=dtype,
        gguf_file=gguf_file,
        config=config,
        run=run,
        info=run.info,
        datasets=sorted({data_set for entry in _inputs(run) if (data_set := _hub_data_set(entry))}),
        inputs=[_public_name(entry) for entry in _inputs(run)],
        **_tables(run, run.info) if run.info else {},
        curves_file=CURVES_FILE if curves is not None else None,
        curve=_curve_rows(run),
        samples=_samples(run),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # Markdown: nothing is escaped
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _tables(run: Run, info: CheckpointInfo) -> dict[str, Sequence[tuple[str, ...]]]:
    """Rows of the tables that only a checkpoint of ours has."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "commit")
    mixture = mixture_text([source.name for source in info.sources], info.phases) if info.sources else ""
    origin = {
        "step": f"{info.step:,}",
        "mixture of the data": mixture,
        "commit of the pipeline": f"`{run.versions['commit']}`" if run.versions.get("commit") else "",
        "trained with": versions,
        "data (sha256 of the manifest)": f"`{info.manifest_fingerprint}`",
        "tokenizer (sha256)": f"`{info.tokenizer_fingerprint}`",
        "MLflow run": f"`{run.mlflow_run_id}`" if run.mlflow_run_id else "",
    }
    losses = [("train loss, first step", f"{info.first_loss:.4f}"), ("train loss, last", f"{info.last_loss:.4f}")]
    scores = {key: value for key, value in run.scores.items() if value is not None}
    return {
        "recipe": [*_rows(info.config, _RECIPE), ("workers", str(info.world_size))],
        "results": [*losses, *_rows(scores, _SCORES), *task_rows(scores)],
        "comparison": comparison(scores, tokens=info.tokens_seen),
        "speed": speed_rows(run.history, {}),
        "origin": [(name, value) for name, value in origin.items() if value],
    }


def _samples(run: Run) -> list[tuple[int, str]]:
    """Step and text, indented as Markdown's code is, of the last samples before the checkpoint."""
    if run.info is None:
        return []
    texts = [(step, text) for step, _, text in run.history.samples if step <= run.info.step]
    return [(step, textwrap.indent(text, "    ", lambda line: True)) for step, text in texts[-_MOST_SAMPLES:]]


def _rows(values: dict[str, Any], labels: dict[str, str]) -> list[tuple[str, str]]:
    return [(label, _show(values[key])) for key, label in labels.items() if values.get(key) is not None]


def _curve_rows(run: Run) -> list[tuple[str, str, str]]:
    """Step, train loss and val loss at about _TABLE_ROWS steps, evenly chosen, the last one among them."""
    steps, val = sorted(run.losses), run.history.metrics.get("val/loss", {})
    chosen = sorted({*steps[:: max(1, math.ceil(len(steps) / _TABLE_ROWS))], *steps[-1:]})
    return [(f"{step:,}", f"{run.losses[step]:.4f}", f"{val[step]:.4f}" if step in val else "") for step in chosen]


def _read_manifest(info: CheckpointInfo) -> Manifest | None:
    """The manifest that the run was trained on, where it is there and still the same; of a mixture, all in one."""
    folders = [source.data for source in info.sources] or [info.data]
    try:
        manifests = [Manifest.load(resolve_output(folder)) for folder in folders]
    except UserError as error:
        logger.warning("the model card says nothing of the data: %s", error)
        return None
    if joint_fingerprint([manifest.fingerprint for manifest in manifests]) != info.manifest_fingerprint:
        return None
    if len(manifests) == 1:
        return manifests[0]
    return replace(
        manifests[0],
        shards=tuple(entry for manifest in manifests for entry in manifest.shards),
        inputs=tuple(entry for manifest in manifests for entry in manifest.inputs),
    )


def _read_scores(folder: Folder, checkpoint: str) -> dict[str, Any]:
    try:
        scores = read_json(folder, SCORES_FILE, _Scores, mend="delete it")
    except DamagedFileError as error:
        logger.warning("the model card says nothing of scores: %s", error)
        return {}
    if scores is None:
        logger.info("no scores in the model card; jobs/evaluate.py before the export puts them there")
        return {}
    return dict(scores) if scores.get("checkpoint") == checkpoint else {}


def _inputs(run: Run) -> Sequence[dict[str, Any]]:
    return run.manifest.inputs if run.manifest else ()


def _public_name(entry: dict[str, Any]) -> str:
    """An address as it is, without a password; of a local path the last part."""
    name = str(entry.get("name") or entry.get("path") or entry.get("source") or "unnamed")
    return redact(name) if "://" in name else name.rstrip("/").rpartition("/")[2]


def _hub_data_set(entry: dict[str, Any]) -> str | None:
    name = str(entry.get("name", ""))
    if not name.startswith("hf://datasets/"):
        return None
    owner, title = name.removeprefix("hf://datasets/").split("/")[:2]
    return f"{owner}/{title.partition('@')[0]}"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 and value != round(value) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
