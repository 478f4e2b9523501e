"""A run as its folder shows it: what may go on from which checkpoint, what came out, what it was made from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.bpe import Tokenizer
from pipeline.checkpoint import CheckpointInfo, check_shape, list_checkpoints, read_info
from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.manifest import Manifest, as_folder
from pipeline.storage import Folder
from pipeline.tokenizer_file import TOKENIZER_NAME, load_tokenizer
from pipeline.tracking import RunInput

SUMMARY_FILE = "summary.json"
_ORDER_SETTINGS = ("context_length", "tokens_per_step", "seed")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What came out of a finished run (<run>/summary.json)."""

    steps: int
    tokens_seen: int
    parameters: int
    first_loss: float
    """Training loss of the first step, nats per token."""
    last_loss: float
    """Training loss of the last step, nats per token."""
    val_loss: float
    """On the val set's first val_tokens, nats per token."""
    val_tokens: int
    sample: str
    tokens_per_second: float
    """Over the steps of the last start, evaluation and checkpoints left out."""
    checkpoint: str
    """Folder of the last checkpoint."""
    peak_memory_gib: float
    """Largest resident memory of rank 0 (on a GPU: of its allocator)."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.val_loss)


def open_data(folder: Folder) -> tuple[Tokenizer, Manifest]:
    """Tokenizer and manifest of a folder of shards, checked against each other.

    Raises:
        UserError: no such data, or shards that another tokenizer made.
    """
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"the shards in {folder} were made with another tokenizer than its tokenizer.json (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]} against {tokenizer.fingerprint[:12]}); tokenize again"
        )
    return tokenizer, manifest


def check_resumable(path: Path, info: CheckpointInfo, config: PretrainConfig, manifest: Manifest) -> None:
    """Raise a UserError where going on from checkpoint ``path`` would not be the same run."""
    check_shape(path, info, config.model_config(manifest.vocab_size))
    if info.manifest_fingerprint != manifest.fingerprint:
        what = "tokenizer" if info.tokenizer_fingerprint != manifest.tokenizer_fingerprint else "shards"
        raise UserError(
            f"checkpoint {path} was trained on other {what} than --data holds; give a new --output or the old --data"
        )
    for name in _ORDER_SETTINGS:
        if info.config[name] != getattr(config, name):
            raise UserError(
                f"checkpoint {path} was trained with {name} {info.config[name]}, now it is {getattr(config, name)}; "
                "that changes the data order, so keep it, or give a new --output"
            )


def finished_summary(config: PretrainConfig, *, data: Path | Folder, output: Path) -> RunSummary | None:
    """The summary of this very run if it has reached train_steps; checks what a resume would check.

    Needs neither Ray nor a process group, so that jobs can say at once what is done or what does not fit.
    """
    _, manifest = open_data(as_folder(data))
    checkpoints = list_checkpoints(output / "checkpoints")
    if not checkpoints:
        return None
    step, path = checkpoints[-1]
    check_resumable(path, read_info(path), config, manifest)
    summary_file = output / SUMMARY_FILE
    if step < config.train_steps or not summary_file.is_file():
        return None
    summary = RunSummary(**json.loads(summary_file.read_text(encoding="utf-8")))
    return summary if summary.steps >= config.train_steps else None


def write_summary(output: Path, summary: RunSummary) -> None:
    partial = output / f"{SUMMARY_FILE}.tmp"
    partial.write_text(json.dumps(asdict(summary), indent=2), encoding="utf-8")
    partial.replace(output / SUMMARY_FILE)


def run_inputs(data: Folder, manifest: Manifest) -> list[RunInput]:
    """What the run is made from, with fingerprints: the lineage of its weights."""
    inputs = [
        RunInput(
            name=f"{data.url.rpartition('/')[2]}-{split}",  # MLflow takes equal names and fingerprints for one data set
            fingerprint=manifest.fingerprint,
            source=str(data),
            context=context,
            profile={"tokens": manifest.tokens(split), "documents": manifest.documents(split)},
        )
        for split, context in (("train", "training"), ("val", "validation"))
    ]
    tokenizer = RunInput(
        name="tokenizer",
        fingerprint=manifest.tokenizer_fingerprint,
        source=f"{data}/{TOKENIZER_NAME}",
        context="tokenizer",
        profile={"vocab_size": manifest.vocab_size},
    )
    return [*inputs, tokenizer]
