"""What the run folder says of a run: whether it can resume, its summary, its best checkpoint, its inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoints.metadata import CheckpointInfo, SourceInfo
from pipeline.checkpoints.reader import check_shape, list_checkpoints, newest_info
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.mixed_order import Phases
from pipeline.dataset.training_data import ONE_SOURCE, Folders, TrainingData, as_folders, mixture_text, open_sources
from pipeline.errors import UserError
from pipeline.evaluation.validation import perplexity
from pipeline.run_files import (
    BEST_FILE,
    CHECKPOINTS_FOLDER,
    CURVES_FILE,
    JOURNAL_FILE,
    MLFLOW_RUN_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
)
from pipeline.storage.folders import Folder, as_folder, open_folder
from pipeline.storage.json_files import read_json, write_json
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking.journal import read_journal
from pipeline.tracking.tracker import RunInput
from pipeline.training.schedule import SETTINGS, check_schedule

_ORDER_SETTINGS = ("context_length", "tokens_per_step", "seed", "packing")
_OF_OLDER_VERSIONS = {"packing": "sequential", "document_mask": False}
"""Settings that the checkpoints of older versions do not name, and what they were."""
_NOT_IN_A_STEP = {
    *("data", "phase", "output", "branch_from", "step", "depth", "tokens_per_parameter", "vocab_size", "dry_run"),
    *("lr", *SETTINGS),  # the learning rates themselves are compared
    *("batch_size", "grad_accum_steps", "num_workers", "resize_seconds"),  # how sums are rounded, at most
    *("device", "compile", "deterministic", "recompute", "collective_timeout", "max_failures", "skip_nonfinite"),
    *("profile_steps", "log_every", "val_every", "val_tokens", "sample_every", "sample_prompt", "sample_tokens"),
    *("tasks", "task_files", "task_questions", "tasks_every"),
    *("hellaswag", "hellaswag_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("tracking_uri", "experiment", "registered_model", "price_per_hour", "tokens_per_second"),
}
"""Settings that may change without a step becoming another one."""
_PLACES = {
    *("data", "output", "branch_from", "step", "checkpoint", "hellaswag", "dry_run"),
    *("tasks", "task_files", "task_questions", "tasks_every"),
    *("tracking_uri", "experiment", "registered_model", "price_per_hour", "tokens_per_second"),
}
"""Settings that no step depends on, or that name a file which every process finds elsewhere."""
_OF_THE_START = {"checkpoint", "init_std", "embedding_init_std", "zero_init_projections", "zero_init_output"}
"""Settings that decide the weights before the first step only."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The result of a finished run (<run>/summary.json)."""

    steps: int
    tokens_seen: int
    parameters: int
    first_loss: float
    """Training loss of the first step, nats per token."""
    last_loss: float
    """Training loss of the last step, nats per token."""
    val_loss: float | None
    """Validation loss on the first val_tokens of the val set, nats per token; None without validation."""
    val_tokens: int
    sample: str
    tokens_per_second: float
    """Mean over the steps since the last start, without evaluations and checkpoints."""
    checkpoint: str
    """Folder of the last checkpoint."""
    peak_memory_gib: float
    """Peak resident memory of rank 0, or of its GPU allocator."""
    best_step: int | None = None
    """Step of the checkpoint with the lowest val loss."""
    best_val_loss: float | None = None
    hellaswag_acc_norm: float | None = None
    """HellaSwag after the last step, or None if it was not evaluated."""
    hellaswag_acc: float | None = None
    hellaswag_questions: int | None = None
    task_scores: dict[str, float] | None = None
    """Scores on the tasks after the last step by the names of their metrics, or None if none were scored."""
    val_accuracy: float | None = None
    """Share of the tokens of val_loss that were the likeliest, of conversations; None where it was not counted."""

    @property
    def perplexity(self) -> float | None:
        return None if self.val_loss is None else perplexity(self.val_loss)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The checkpoint with the lowest val loss so far (<run>/best.json); it is kept."""

    step: int
    val_loss: float


def read_best(output: Folder) -> Best | None:
    """The best checkpoint of the run in ``output``; None before the first validation."""
    return read_json(output, BEST_FILE, Best, mend="delete it; the next validation writes it again")


def write_best(output: Folder, best: Best | None) -> None:
    if best is None:
        output.delete(BEST_FILE)
    else:
        write_json(output, BEST_FILE, asdict(best))


def best_left(output: Folder) -> Best | None:
    """The best checkpoint among those that there are; None where none is known to have been validated.

    Where the one of best.json is gone, the journal tells the val losses of the others.
    """
    steps = {step for step, _ in list_checkpoints(open_folder(f"{output}/{CHECKPOINTS_FOLDER}"))}
    best = read_best(output)
    if best is None or best.step in steps:
        return best
    losses: dict[int, float] = {}
    for entry in read_journal(output):
        if entry["kind"] == "rollback":
            losses = {step: loss for step, loss in losses.items() if step <= entry["step"]}
        elif entry["kind"] == "checkpoint" and "val_loss" in entry["values"]:
            losses[entry["step"]] = entry["values"]["val_loss"]
    left = [(loss, step) for step, loss in losses.items() if step in steps and math.isfinite(loss)]
    return Best(step=min(left)[1], val_loss=min(left)[0]) if left else None


def step_settings(config: PretrainConfig, data: TrainingData, start_step: int) -> dict[str, Any]:
    """What decides the numbers of the steps after ``start_step``, besides their learning rates.

    Done again with other settings, they are other steps.
    """
    left_out = _NOT_IN_A_STEP | (_OF_THE_START if start_step else set())
    settings = {name: value for name, value in to_dict(config).items() if name not in left_out}
    if data.is_mixture:
        settings |= {"mixture": data.mixture_text}
    return settings | {"training_fingerprint": data.fingerprint}


def require_own(output: Folder) -> None:
    """Raise UserError where a folder in which no run was begun holds files that a run would replace."""
    if output.size(JOURNAL_FILE) is not None or output.size(MLFLOW_RUN_FILE) is not None:
        return
    for name in (REPORT_FILE, CURVES_FILE):
        if output.size(name) is not None:
            raise UserError(
                f"output folder {output} holds a {name} and no run, which would replace it; choose another --output"
            )


def open_data_of_run(config: PretrainConfig, folders: Folders) -> TrainingData:
    """The data of a run; ``folders`` are those of config.mixture, in its order.

    Raises:
        UserError: no such data, too little to train on, nothing to validate on though the settings ask for it, several
            tokenizers, or a sample prompt that is longer than the context.
    """
    mixture = config.mixture
    data = open_sources(as_folders(folders), mixture.names, mixture.phases)
    for source in data.sources:
        _check_source(config, source.folder, source.manifest)
    _check_sample_prompt(config, data.tokenizer)
    return data


def _check_source(config: PretrainConfig, data: Folder, manifest: Manifest) -> None:
    config.check_vocab_size(manifest.vocab_size)
    if not manifest.tokens("train"):
        raise UserError(
            f"data folder {data} has nothing to train on: all its documents are held out for validation; "
            "tokenize again, into another folder, with a lower --val_fraction"
        )
    if manifest.chat_template and (length := manifest.settings["context_length"]) != config.context_length:
        raise UserError(
            f"data folder {data} holds conversations in windows of context_length {length}, but the settings say "
            f"{config.context_length}; give --context_length {length}, or another --data"
        )
    if manifest.chat_template and config.packing != "sequential":
        raise UserError(
            f"data folder {data} holds conversations, which lie in windows of their own already; leave --packing "
            f"{config.packing} out"
        )
    if manifest.tokens("train") <= config.context_length:
        raise UserError(
            f"data folder {data} has {manifest.tokens('train'):,} tokens to train on, fewer than one window of "
            f"context_length {config.context_length:,} + 1 tokens; give more text, or a lower --context_length"
        )
    if config.val_every and manifest.tokens("val") < 2:
        raise UserError(
            f"data folder {data} has nothing to validate on: no document is held out; give --val_every 0 to train "
            "without, or tokenize again, into another folder, with a larger --val_fraction or --val_split tail"
        )


def _check_sample_prompt(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """A token is at least one byte, so most prompts need not be encoded."""
    prompt, most = config.sample_prompt, config.context_length
    if len(prompt.encode("utf-8", "replace")) > most and (found := len(tokenizer.encode(prompt))) > most:
        raise UserError(
            f"--sample_prompt has {found:,} tokens, but the network sees {most:,} at once; shorten it, or raise "
            "--context_length"
        )


def check_resumable(path: Folder | str, info: CheckpointInfo, config: PretrainConfig, data: TrainingData) -> None:
    """Check that resuming from checkpoint ``path`` continues the same run.

    Raises:
        UserError: model shape, shards, tokenizer, data order or optimizer differ, the learning rate's schedule would
            bend, or the checkpoint is beyond train_steps.
    """
    expected = config.model_config(data.manifest.vocab_size)
    check_shape(f"checkpoint {path}", info.model_config.to_dict(), expected, otherwise="another --output for a new run")
    _check_windows(path, info, data)
    settings = _OF_OLDER_VERSIONS | info.config
    for name in _ORDER_SETTINGS:
        if settings[name] != getattr(config, name):
            raise UserError(
                f"checkpoint {path} was trained with {name} {settings[name]}, now it is {getattr(config, name)}; "
                "that changes the data order, so keep it, or give a new --output"
            )
    optimizer = info.config.get("optimizer", "adamw")
    if optimizer != config.optimizer:
        raise UserError(
            f"checkpoint {path} was trained with optimizer {optimizer}, now it is {config.optimizer}, which has "
            f"a state of another kind; give --optimizer {optimizer}, or another --output with --checkpoint {path}"
        )
    if info.step > config.train_steps:
        raise UserError(
            f"checkpoint {path} is beyond --train_steps {config.train_steps}: {info.step} steps are done; give "
            f"--train_steps {info.step} or more, or another --output for a new run"
        )
    check_schedule(path, info, config)


def mixture_info(data: TrainingData) -> dict[str, Any]:
    """The fields of CheckpointInfo that a mixture has; none for one folder."""
    if not data.is_mixture:
        return {}
    sources = tuple(
        SourceInfo(name=source.name, data=str(source.folder), manifest_fingerprint=source.manifest.fingerprint)
        for source in data.sources
    )
    return {"sources": sources, "phases": data.phases}


def _check_windows(path: Folder | str, info: CheckpointInfo, data: TrainingData) -> None:
    """UserError unless the steps done had the windows that ``data`` gives to them; later phases may be any."""
    if info.tokenizer_fingerprint != data.manifest.tokenizer_fingerprint:
        what = "tokenizer"
    elif not info.sources and not data.is_mixture and info.manifest_fingerprint != data.fingerprint:
        what = "shards"
    else:
        what = ""
    if what:
        raise UserError(
            f"checkpoint {path} was trained on other {what} than --data holds; give a new --output or the old --data"
        )
    sources = info.sources or (
        SourceInfo(name=info.data, data=info.data, manifest_fingerprint=info.manifest_fingerprint),
    )
    saved = {source.manifest_fingerprint: source.data for source in sources}
    given = {source.manifest.fingerprint: str(source.folder) for source in data.sources}
    before = _past([*saved], info.phases or ONE_SOURCE, info.step)
    now = _past([*given], data.phases, info.step)
    if before == now:
        return
    changed = sorted(given[key] for key in given.keys() - saved.keys() if given[key] in saved.values())
    if changed:
        difference = f"the shards of {' and '.join(changed)} are others now"
    else:
        was, would = mixture_text([*saved.values()], info.phases or ONE_SOURCE), data.mixture_text
        difference = f"that was {was}, and is {would} now"
    raise UserError(
        f"checkpoint {path} was trained on other windows than --data and --phase give to its {info.step} steps: "
        f"{difference}; what is to change must begin with a --phase at step {info.step} or later, else give a new "
        "--output"
    )


def _past(fingerprints: Sequence[str], phases: Phases, num_steps: int) -> list[tuple[int, list[tuple[int, str, int]]]]:
    """What decides the windows of the first ``num_steps`` steps: by phase, each folder's place, shards and weight."""
    return [
        (first, [(place, fingerprints[place], part) for place, part in enumerate(parts) if part])
        for first, parts in phases
        if first < num_steps
    ]


def finished_summary(config: PretrainConfig, *, data: Folders, output: Path | Folder) -> RunSummary | None:
    """The summary of this run if it has reached train_steps, else None; checks the same as a resume.

    It needs neither Ray nor a process group, so that jobs can report at once that a run is done or does not match.
    """
    opened = open_data_of_run(config, data)
    output = as_folder(output)
    newest = newest_info(open_folder(f"{output}/{CHECKPOINTS_FOLDER}"))
    if newest is None:
        return None
    place, info = newest
    check_resumable(place, info, config, opened)
    found = read_json(output, SUMMARY_FILE, RunSummary, mend="delete it and run the same command again")
    if found is None or min(info.step, found.steps) < config.train_steps:
        return None
    best = best_left(output)
    if best is None or best.step != found.best_step:  # the one it names may be gone
        step, loss = (best.step, best.val_loss) if best else (None, None)
        found = replace(found, best_step=step, best_val_loss=loss)
    return found


def changed_settings(config: PretrainConfig, output: Folder) -> str:
    """What the settings say otherwise than the newest checkpoint, as in "lr 0.02 instead of 0.004"; empty for nothing.

    Not compared are names of places and files, and what a checkpoint of an older version does not know, unless it is
    sure what it was.
    """
    newest = newest_info(open_folder(f"{output}/{CHECKPOINTS_FOLDER}"))
    if newest is None:
        return ""
    before, now = _OF_OLDER_VERSIONS | newest[1].config, json.loads(json.dumps(to_dict(config)))
    names = [name for name in now if name in before and name not in _PLACES and now[name] not in (before[name], "auto")]
    return ", ".join(f"{name} {now[name]} instead of {before[name]}" for name in names)


def run_inputs(data: TrainingData) -> list[RunInput]:
    """The data sets and the tokenizer of the run with their fingerprints: the lineage of its weights."""
    inputs = [
        RunInput(
            name=f"{source.folder.url.rpartition('/')[2]}-{split}",  # for MLflow, equal names and fingerprints are one
            fingerprint=source.manifest.fingerprint,
            source=str(source.folder),
            context=context,
            profile={"tokens": source.manifest.tokens(split), "documents": source.manifest.documents(split)},
            weight=weight if data.is_mixture else None,
        )
        for source, weight in zip(data.sources, data.weights, strict=True)
        for split, context in (("train", "training"), ("val", "validation"))
    ]
    tokenizer = RunInput(
        name="tokenizer",
        fingerprint=data.manifest.tokenizer_fingerprint,
        source=f"{data.sources[0].folder}/{TOKENIZER_NAME}",
        context="tokenizer",
        profile={"vocab_size": data.manifest.vocab_size},
    )
    return [*inputs, tokenizer]
