"""The ways to name a model: a checkpoint, a run, an exported folder, hf://OWNER/NAME, an MLflow model.

Every job that reads a model accepts all of them; resolve_model finds the folder, fetched where it lies elsewhere,
and open_model makes a network and its tokenizer of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints.metadata import TOKENIZER_FILE
from pipeline.checkpoints.reader import find_checkpoint, local_checkpoint
from pipeline.errors import UserError
from pipeline.paths import resolve_output, resolve_path, working_folder
from pipeline.pretrained import hub_models, huggingface, mlflow_registry, weights
from pipeline.remote.hub_client import fetch_file
from pipeline.run_files import run_folder_of
from pipeline.storage.folders import Folder, LocalFolder, open_folder
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network with its weights, and its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model lies."""

    address: str
    """Path or URL of the checkpoint, or path of the Hugging Face folder."""
    path: Path
    """Folder on this machine: the same, or a copy of what lies elsewhere."""
    run_folder: Folder | None
    """Folder of the training run that the checkpoint belongs to, on a disk or in a bucket; None where there is none."""


def resolve_checkpoint(text: str) -> Path:
    """The folder on this machine that ``text`` stands for; see resolve_model."""
    return resolve_model(text).path


def resolve_model(text: str) -> ModelSource:
    """Find the model that ``text`` stands for: a checkpoint or a Hugging Face folder; both hold a tokenizer.json.

    Args:
        text: a checkpoint folder; a run folder, which stands for its newest checkpoint (either of them on a disk, or in
            a bucket, from where it is fetched); a Hugging Face folder; hf://OWNER/NAME[@REVISION], which is fetched;
            models:/... or runs:/... of MLflow.

    Raises:
        UserError: nothing of the kind is there, or it cannot be fetched.
    """
    if text.startswith("hf://"):
        path = hub_models.download(text)
        if not huggingface.is_exported(path):
            raise UserError(
                f"{text} has no {huggingface.CONFIG_FILE}; give the address of a Llama, a Qwen3 or a GPT-2.5"
            )
        return ModelSource(address=str(path), path=path, run_folder=None)
    if text.startswith(mlflow_registry.SCHEMES):
        text = mlflow_registry.find_model(text, working_folder())
    folder = resolve_output(text)
    if isinstance(folder, LocalFolder) and huggingface.is_exported(folder.path):
        return ModelSource(address=folder.url, path=folder.path, run_folder=None)
    checkpoint = str(find_checkpoint(folder))  # its run folder follows from this address: a fetched copy has another
    run_folder = run_folder_of(checkpoint)
    return ModelSource(
        address=checkpoint,
        path=local_checkpoint(checkpoint),
        run_folder=open_folder(run_folder) if run_folder else None,
    )


def find_questions(text: str) -> Path:
    """The file of HellaSwag's questions, local or fetched from the hub; UserError where there is none."""
    if text.startswith("hf://"):
        return fetch_file(text)
    path = resolve_path(text)
    if not path.is_file():
        raise UserError(f"there are no HellaSwag questions at {path}; give the path of a hellaswag_val.jsonl")
    return path


def copy_questions(path: Path, run: Folder) -> str:
    """Copy HellaSwag's questions into a run's folder, which every worker can read; returns their address."""
    name = f"hellaswag{path.suffix}"
    run.write(name, [path.read_bytes()])
    return f"{run}/{name}"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a resolved folder; UserError where it does not fit the model."""
    tokenizer = Tokenizer.from_file(path / TOKENIZER_FILE)
    vocab_size = weights.read_model_config(path).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {vocab_size:,}; mend it")
    eot_id = weights.read_eot_id(path)
    is_known = eot_id in range(tokenizer.vocab_size) and eot_id not in tokenizer.holes
    return tokenizer.with_eot_id(eot_id) if eot_id is not None and is_known else tokenizer


def open_model(path: Path, device: torch.device) -> Pretrained:
    """The network of a resolved folder, float32 on ``device``, and its tokenizer."""
    model = Transformer(weights.read_model_config(path)).to(device)
    weights.load_weights(path, model)
    return Pretrained(model=model.eval(), tokenizer=read_tokenizer(path))
