"""The work of jobs/evaluate.py: val loss, perplexity, bits per byte, and scores on tasks, of any model.

One process computes them, or several workers of Ray Train share the val set and the questions; the results are the same
up to rounding. They are written to a JSON file and, for a checkpoint of a run, to the run folder and its MLflow run.
Results on tasks are kept one by one (tasks/scoring.py), so that the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.transformer import Transformer
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.cluster.workers import GroupSettings, SharedFiles, run_workers
from pipeline.config.inference import EvaluateConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import PackedStream, open_split
from pipeline.dataset.token_counts import byte_lengths, count_tokens
from pipeline.dataset.training_data import ValSource, joint_fingerprint
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.hardware import compute_dtype
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import hellaswag
from pipeline.evaluation.chat_validation import chat_validation
from pipeline.evaluation.validation import (
    entropy,
    mixed_bits_per_byte,
    mixed_result,
    perplexity,
    validation_loss,
)
from pipeline.paths import resolve_output, resolve_output_file, working_folder
from pipeline.pretrained import huggingface, weights
from pipeline.pretrained.resolve import find_questions, read_tokenizer, resolve_model
from pipeline.run_files import REPORT_FILE, SCORES_FILE, TASK_SCORES_FILE
from pipeline.storage.folders import Folder, open_folder
from pipeline.storage.json_files import DamagedFileError, read_json
from pipeline.tasks.catalog import core_result, read_tasks
from pipeline.tasks.questions import Task, store_tasks, stored_tasks
from pipeline.tasks.results import TaskResult, all_figures
from pipeline.tasks.scoring import KeptScores, read_kept, score_tasks
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking.journal import read_journal
from pipeline.tracking.mlflow_run import find_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.report import write_pages
from pipeline.tracking.tracker import log_files

logger = logging.getLogger(__name__)

_MOST_TOKENS = 8192  # of a forward pass, whose logits are all in memory at once


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of an evaluation, as in evaluation.json; None where something was not measured."""

    checkpoint: str
    step: int | None = None
    tokens_seen: int | None = None
    manifest_fingerprint: str | None = None
    val_tokens: int | None = None
    """Number of predicted tokens, <|endoftext|> included."""
    val_loss: float | None = None
    """Nats per token; of a mixture, the mean with the weights of its first phase."""
    val_losses: dict[str, float] | None = None
    """Of a mixture, the val loss of each source."""
    document_mask: bool | None = None
    """True where no token of the val set saw another document, else None."""
    bits_per_byte: float | None = None
    """Bits per byte of the text of exactly these tokens, which can be compared between tokenizers."""
    unigram_entropy: float | None = None
    """Entropy of the token frequencies in nats: the loss of the best model that ignores the context."""
    val_accuracy: float | None = None
    """Share of the tokens of answers that are the likeliest at their place; None where there are no conversations."""
    hellaswag_acc_norm: float | None = None
    hellaswag_acc: float | None = None
    hellaswag_questions: int | None = None
    tasks: dict[str, TaskResult] | None = None
    """The results of --tasks by name."""
    core: float | None = None
    """The mean of the centred accuracies of all of CORE's tasks."""
    core_stderr: float | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.val_loss is None else perplexity(self.val_loss)

    @property
    def learned(self) -> float | None:
        """Nats per token below the unigram entropy."""
        return None if self.val_loss is None or self.unigram_entropy is None else self.unigram_entropy - self.val_loss

    def figures(self) -> dict[str, float]:
        """The scores that were measured, under their names in evaluation.json."""
        values = asdict(self) | {"perplexity": self.perplexity}
        names = (
            *("val_loss", "perplexity", "bits_per_byte", "unigram_entropy", "val_accuracy"),
            *("hellaswag_acc_norm", "hellaswag_acc", "core", "core_stderr"),
        )
        by_source = {f"val_loss_{name}": loss for name, loss in (self.val_losses or {}).items()}
        measured = {name: values[name] for name in names if values[name] is not None}
        return measured | by_source | all_figures(self.tasks or {})


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """A folder of shards whose val set is evaluated."""

    folder: str
    """Its address."""
    name: str = "data"
    """What it is called in metrics, where there are several."""
    weight: float = 1.0
    """Its share in the val loss; all sum up to 1."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker needs to know."""

    config: EvaluateConfig
    """With checkpoint and hellaswag as workers find them; questions that are None are not asked."""
    data: tuple[EvaluationData, ...]
    """Without any there is no val loss."""
    tasks: tuple[Task, ...] = ()
    stored: tuple[str, str] | None = None
    """Folder and name of the file that holds the tasks, where workers do not get them from here."""
    kept: KeptScores | None = None
    """Results on tasks that need not be measured again."""
    keep_in: tuple[str, str] | None = None
    """Folder and name of the file in which results on tasks are kept."""
    document_mask: bool = False
    """Whether no token of the val set sees another document."""


def evaluate(config: EvaluateConfig, *, reuse: bool = False) -> Scores:
    """Evaluate a model as ``config`` says.

    Args:
        reuse: return the scores of an earlier evaluation of the same checkpoint on the same data, if it has them all.

    Raises:
        UserError: the model or its data do not exist, the shards have another tokenizer, or there is nothing to do.
    """
    target = resolve_output_file(config.output) if config.output else None
    source = resolve_model(config.checkpoint)
    path, run_folder = source.path, source.run_folder
    data = _find_data(config, path)
    questions = str(find_questions(config.hellaswag)) if config.hellaswag else None
    tasks = read_tasks(config)
    if not data and questions is None and not tasks:
        raise UserError(f"{path} does not say which data it was trained on; give --data or --hellaswag, or --tasks")
    manifests = [_check_data(each.folder, path) for each in data]
    mask = _masks_documents(config, path, manifests)
    if reuse and run_folder and (saved := _saved_scores(config, run_folder, source.address, manifests, mask)):
        return saved
    config_of_work = replace(config, checkpoint=str(path), hellaswag=questions)
    work = Work(config=config_of_work, data=tuple(data), tasks=tasks, document_mask=mask)
    if tasks:
        work = _with_kept(work, run_folder or (target[0] if target else None))
    if config.num_workers == 1:
        result = evaluate_on_rank(work)
    else:
        result = _evaluate_on_workers(work, run_folder or open_folder(tempfile.mkdtemp(prefix="gpt25-evaluate-")))
    scores = Scores(
        checkpoint=source.address,
        manifest_fingerprint=_fingerprint(manifests),
        document_mask=mask or None,
        **weights.read_progress(path),
        **result,
    )
    _save(config, run_folder, scores, target)
    return scores


def _with_kept(work: Work, folder: Folder | None) -> Work:
    """Results on tasks are kept in ``folder``, and those of an interrupted evaluation are taken from it."""
    if folder is None:
        logger.info("the model has no run folder; give --output, and results on tasks are kept beside that file")
        return work
    model = weights.fingerprint(Path(work.config.checkpoint))
    kept = read_kept(folder, TASK_SCORES_FILE, model)
    return replace(work, kept=kept, keep_in=(folder.url, TASK_SCORES_FILE))


def _evaluate_on_workers(work: Work, shared: Folder) -> dict[str, Any]:
    """evaluate_on_rank on the workers of a group; ``shared`` is a folder that all of them see."""
    group = GroupSettings(num_workers=work.config.num_workers, device=work.config.device)
    if not work.tasks:
        return run_workers(evaluate_on_rank, work, group, shared)
    name = f"tasks-{uuid.uuid4().hex}.json"
    store_tasks(work.tasks, shared, name)
    try:
        return run_workers(evaluate_on_rank, replace(work, tasks=(), stored=(shared.url, name)), group, shared)
    finally:
        shared.delete(name)


def evaluate_on_rank(work: Work, _: SharedFiles | None = None) -> dict[str, Any]:
    """Measure this rank's share; returns the fields of Scores for all ranks together. Collective."""
    config = work.config
    path = Path(config.checkpoint)
    workers = init_distributed(config.device)
    model = Transformer(weights.read_model_config(path))
    parallelize(model, workers, dtype=compute_dtype("auto", workers.device), compile_blocks=False)
    weights.load_weights(path, model)
    tokenizer = read_tokenizer(path)
    result: dict[str, Any] = {}
    tokens_per_batch = min(config.batch_size * model.config.context_length, _MOST_TOKENS)
    if work.data:
        result |= _val_scores(model, tokenizer, work, workers)
    if config.hellaswag:
        questions = hellaswag.read_questions(config.hellaswag, config.hellaswag_questions)
        encoded = hellaswag.encode_all(questions, tokenizer)
        result |= hellaswag.score(model, encoded, workers, tokens_per_batch=tokens_per_batch).figures()
    tasks = stored_tasks(open_folder(work.stored[0]), work.stored[1]) if work.stored else work.tasks
    if tasks:
        keep_in = (open_folder(work.keep_in[0]), work.keep_in[1]) if work.keep_in else None
        sizes: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "kept": work.kept, "keep_in": keep_in}
        found = score_tasks(model, tokenizer, tasks, workers, **sizes)
        result |= {"tasks": found} | core_result(config.tasks or "", found)
    return result


def _val_scores(model: Transformer, tokenizer: Tokenizer, work: Work, workers: ProcessGroup) -> dict[str, Any]:
    sources = [
        ValSource(
            name=each.name,
            weight=each.weight,
            stream=open_split(open_folder(each.folder), "val", num_folders=len(work.data)),
        )
        for each in work.data
    ]
    if isinstance(sources[0].stream, PackedStream):
        return _chat_scores(model, sources[0].stream, work, workers)
    results = [
        validation_loss(
            model,
            source.stream,
            workers,
            context_length=model.config.context_length,
            batch_size=work.config.batch_size,
            max_tokens=_share(work.config.val_tokens, len(sources)),
            document_token=tokenizer.eot_id if work.document_mask else None,
        )
        for source in sources
    ]
    whole = mixed_result(sources, results)
    counts = [
        count_tokens(source.stream, 0, result.tokens + 1) for source, result in zip(sources, results, strict=True)
    ]
    scores: dict[str, Any] = {
        "val_tokens": whole.tokens,
        "val_loss": whole.loss,
        "bits_per_byte": mixed_bits_per_byte(whole.loss, sources, results, byte_lengths(tokenizer)),
        "unigram_entropy": entropy(counts[0]),
    }
    if len(sources) > 1:
        shares = [source.weight * each / each.sum() for source, each in zip(sources, counts, strict=True)]
        losses = {source.name: result.loss for source, result in zip(sources, results, strict=True)}
        scores |= {"unigram_entropy": entropy(np.sum(shares, axis=0)), "val_losses": losses}
    return scores


def _chat_scores(model: Transformer, stream: PackedStream, work: Work, workers: ProcessGroup) -> dict[str, Any]:
    """Scores on packed conversations, which are in one folder."""
    length = int(Manifest.load(open_folder(work.data[0].folder)).settings["context_length"])
    limits: dict[str, Any] = {"batch_size": work.config.batch_size, "max_tokens": work.config.val_tokens}
    found = chat_validation(model, stream, workers, context_length=length, **limits)
    return {"val_tokens": found.tokens, "val_loss": found.loss, "val_accuracy": found.accuracy}


def _share(val_tokens: int | None, num_sources: int) -> int | None:
    """Tokens of each val set, where several share them evenly."""
    return None if val_tokens is None else max(1, val_tokens // num_sources)


def _find_data(config: EvaluateConfig, path: Path) -> list[EvaluationData]:
    """--data, or else what the checkpoint was trained on; nothing where that is not known."""
    if config.data:
        return [EvaluationData(folder=str(resolve_output(config.data)))]
    if huggingface.is_exported(path):
        return []
    info = checkpoint_reader.read_info(path)
    if not info.sources:
        return [EvaluationData(folder=str(resolve_output(info.data)))]
    parts = info.phases[0][1]
    return [
        EvaluationData(folder=str(resolve_output(source.data)), name=source.name, weight=part / sum(parts))
        for source, part in zip(info.sources, parts, strict=True)
    ]


def _masks_documents(config: EvaluateConfig, path: Path, manifests: Sequence[Manifest]) -> bool:
    """Whether no token of the val set sees another document; conversations are kept apart in any case."""
    if not manifests or manifests[0].chat_template:
        return False
    if config.document_mask != "auto" or huggingface.is_exported(path):
        return config.document_mask == "on"
    return bool(checkpoint_reader.read_info(path).config.get("document_mask", False))


def _check_data(folder: str, path: Path) -> Manifest:
    data = open_folder(folder)
    manifest = Manifest.load(data)
    if manifest.tokenizer_fingerprint != read_tokenizer(path).fingerprint:
        raise UserError(f"the shards in {data} were made with another tokenizer than {path}; give other --data")
    if manifest.tokens("val") < 2:
        raise UserError(
            f"data folder {data} has nothing to evaluate on: no document is held out; give other --data, or tokenize "
            "again, into another folder, with a larger --val_fraction or --val_split tail"
        )
    return manifest


def _fingerprint(manifests: Sequence[Manifest]) -> str | None:
    return joint_fingerprint([manifest.fingerprint for manifest in manifests]) if manifests else None


def _saved_scores(
    config: EvaluateConfig, run_folder: Folder, checkpoint: str, manifests: Sequence[Manifest], mask: bool
) -> Scores | None:
    """The scores in evaluation.json, if they are of this checkpoint and of the same part of this data."""
    try:
        scores = read_json(run_folder, SCORES_FILE, Scores, mend="the model is evaluated again")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None
    if scores is None:
        return None
    same = (scores.checkpoint, scores.manifest_fingerprint) == (checkpoint, _fingerprint(manifests))
    if manifests:
        most = _share(config.val_tokens, len(manifests))
        targets = [manifest.tokens("val") - 1 for manifest in manifests]
        same = same and scores.val_tokens == sum(min(each, most or each) for each in targets)
        same = same and bool(scores.document_mask) == mask
    has_all = not config.tasks and (not config.hellaswag or scores.hellaswag_acc is not None)
    return scores if same and has_all else None


def _save(config: EvaluateConfig, run_folder: Folder | None, scores: Scores, target: tuple[Folder, str] | None) -> None:
    """Write the scores to the file ``target``, and to the run folder and the MLflow run where the model has one."""
    perplexity = scores.perplexity  # JSON knows no infinity
    known = perplexity if perplexity is not None and math.isfinite(perplexity) else None
    values = asdict(scores) | {"perplexity": known}
    for name in ("val_losses", "document_mask", "tasks", "core", "core_stderr"):  # which most files have not
        if values[name] is None:
            del values[name]
    content = (json.dumps(values, indent=2) + "\n").encode()
    if target is not None:
        folder, name = target
        folder.write(name, [content])
    if run_folder is None:
        return
    run_folder.write(SCORES_FILE, [content])
    finished = run_folder.size(REPORT_FILE) is not None
    pages = write_pages(run_folder, read_journal(run_folder)) if finished else []
    run = find_run(tracking_uri=config.tracking_uri, folder=run_folder, working_folder=working_folder())
    if run is None:
        return
    names = {
        "perplexity": "val_perplexity",
        "bits_per_byte": "val_bits_per_byte",
        "unigram_entropy": "val_unigram_entropy",
    }
    tracker = MLflowTracker(run)
    figures = {f"eval/{names.get(name, name)}": repr(value) for name, value in scores.figures().items()}
    tracker.log_tags(figures | {"eval/step": str(scores.step or 0)})  # of single points MLflow would draw charts
    log_files(tracker, run_folder, *pages)
    tracker.flush()
