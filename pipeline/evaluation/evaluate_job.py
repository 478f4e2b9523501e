"""The work of jobs/evaluate.py: val loss, perplexity, bits per byte and HellaSwag of a model that resolve_model finds.

One process computes them, or several workers of Ray Train share the val set and the questions; the results are the same
up to rounding. They are written to a JSON file and, for a checkpoint of a run, to the run folder and its MLflow run.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.transformer import Transformer
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.cluster.workers import GroupSettings, SharedFiles, run_workers
from pipeline.config.inference import EvaluateConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.dataset.token_counts import byte_lengths, count_tokens
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.hardware import compute_dtype
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.errors import UserError
from pipeline.evaluation import hellaswag
from pipeline.evaluation.validation import bits_per_byte, entropy, perplexity, validation_loss
from pipeline.paths import resolve_output, resolve_output_file, working_folder
from pipeline.pretrained import huggingface, weights
from pipeline.pretrained.resolve import find_questions, read_tokenizer, resolve_model
from pipeline.run_files import REPORT_FILE, SCORES_FILE
from pipeline.storage.folders import Folder, open_folder
from pipeline.storage.json_files import DamagedFileError, read_json
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking.journal import read_journal
from pipeline.tracking.mlflow_run import find_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.report import write_pages
from pipeline.tracking.tracker import log_files

logger = logging.getLogger(__name__)


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
    """Nats per token."""
    bits_per_byte: float | None = None
    """Bits per byte of the text of exactly these tokens, which can be compared between tokenizers."""
    unigram_entropy: float | None = None
    """Entropy of the token frequencies in nats: the loss of the best model that ignores the context."""
    hellaswag_acc_norm: float | None = None
    hellaswag_acc: float | None = None
    hellaswag_questions: int | None = None

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
        names = ("val_loss", "perplexity", "bits_per_byte", "unigram_entropy", "hellaswag_acc_norm", "hellaswag_acc")
        return {name: values[name] for name in names if values[name] is not None}


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
    if data is None and questions is None:
        raise UserError(f"{path} does not say which data it was trained on; give --data or --hellaswag")
    manifest = None if data is None else _check_data(data, path)
    if reuse and run_folder and (saved := _saved_scores(config, run_folder, source.address, manifest)):
        return saved
    resolved = replace(config, checkpoint=str(path), data=str(data) if data else None, hellaswag=questions)
    if config.num_workers == 1:
        result = evaluate_on_rank(resolved)
    else:
        shared = run_folder or open_folder(tempfile.mkdtemp(prefix="gpt25-evaluate-"))
        group = GroupSettings(num_workers=config.num_workers, device=config.device)
        result = run_workers(evaluate_on_rank, resolved, group, shared)
    scores = Scores(
        checkpoint=source.address,
        manifest_fingerprint=manifest.fingerprint if manifest else None,
        **weights.read_progress(path),
        **result,
    )
    _save(config, run_folder, scores, target)
    return scores


def evaluate_on_rank(config: EvaluateConfig, _: SharedFiles | None = None) -> dict[str, Any]:
    """Measure this rank's share; returns the fields of Scores for all ranks together. Collective.

    The model, the data and the questions of ``config`` are resolved: what is None is not measured.
    """
    path = Path(config.checkpoint)
    workers = init_distributed(config.device)
    model = Transformer(weights.read_model_config(path))
    parallelize(model, workers, dtype=compute_dtype("auto", workers.device), compile_blocks=False)
    weights.load_weights(path, model)
    tokenizer = read_tokenizer(path)
    result: dict[str, Any] = {}
    if config.data:
        result |= _val_scores(model, tokenizer, open_folder(config.data), config, workers)
    if config.hellaswag:
        questions = hellaswag.read_questions(config.hellaswag, config.hellaswag_questions)
        tokens_per_batch = config.batch_size * model.config.context_length
        encoded = hellaswag.encode_all(questions, tokenizer)
        result |= hellaswag.score(model, encoded, workers, tokens_per_batch=min(tokens_per_batch, 8192)).figures()
    return result


def _val_scores(
    model: Transformer, tokenizer: Tokenizer, data: Folder, config: EvaluateConfig, workers: ProcessGroup
) -> dict[str, Any]:
    stream = open_split(data, "val")
    length = model.config.context_length
    result = validation_loss(
        model, stream, workers, context_length=length, batch_size=config.batch_size, max_tokens=config.val_tokens
    )
    return {
        "val_tokens": result.tokens,
        "val_loss": result.loss,
        "bits_per_byte": bits_per_byte(result.loss, stream, result.tokens, byte_lengths(tokenizer)),
        "unigram_entropy": entropy(count_tokens(stream, 0, result.tokens + 1)),
    }


def _find_data(config: EvaluateConfig, path: Path) -> Folder | None:
    if config.data:
        return resolve_output(config.data)
    return None if huggingface.is_exported(path) else resolve_output(checkpoint_reader.read_info(path).data)


def _check_data(data: Folder, path: Path) -> Manifest:
    manifest = Manifest.load(data)
    if manifest.tokenizer_fingerprint != read_tokenizer(path).fingerprint:
        raise UserError(f"the shards in {data} were made with another tokenizer than {path}; give other --data")
    if manifest.tokens("val") < 2:
        raise UserError(
            f"data folder {data} has nothing to evaluate on: no document is held out; give other --data, or tokenize "
            "again, into another folder, with a larger --val_fraction or --val_split tail"
        )
    return manifest


def _saved_scores(
    config: EvaluateConfig, run_folder: Folder, checkpoint: str, manifest: Manifest | None
) -> Scores | None:
    """The scores in evaluation.json, if they are of this checkpoint and of the same part of this data."""
    try:
        scores = read_json(run_folder, SCORES_FILE, Scores, mend="the model is evaluated again")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None
    if scores is None:
        return None
    same = (scores.checkpoint, scores.manifest_fingerprint) == (checkpoint, manifest.fingerprint if manifest else None)
    if manifest is not None:
        targets = manifest.tokens("val") - 1
        same = same and scores.val_tokens == min(targets, config.val_tokens or targets)
    return scores if same and (not config.hellaswag or scores.hellaswag_acc is not None) else None


def _save(config: EvaluateConfig, run_folder: Folder | None, scores: Scores, target: tuple[Folder, str] | None) -> None:
    """Write the scores to the file ``target``, and to the run folder and the MLflow run where the model has one."""
    perplexity = scores.perplexity  # JSON knows no infinity
    known = perplexity if perplexity is not None and math.isfinite(perplexity) else None
    content = (json.dumps(asdict(scores) | {"perplexity": known}, indent=2) + "\n").encode()
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
