"""What a user may call a model: a checkpoint, a run, an exported folder, hf://OWNER/NAME, an MLflow model.

Every job that reads a model takes the same words; resolve_checkpoint turns them into a folder on this machine, and
open_model into a network and its tokenizer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints.metadata import TOKENIZER_FILE
from pipeline.checkpoints.reader import local_checkpoint
from pipeline.errors import UserError
from pipeline.paths import resolve_path, working_folder
from pipeline.pretrained import hub_models, huggingface
from pipeline.storage.folders import Folder, in_bucket
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

_MLFLOW_SCHEMES = ("models:/", "runs:/")


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network with its weights, and what its ids mean."""

    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def resolve_checkpoint(text: str) -> Path:
    """The folder that ``text`` stands for: a checkpoint or a Hugging Face folder; both hold a tokenizer.json.

    Args:
        text: a checkpoint folder; a run folder, which stands for its newest checkpoint (either of them on a disk, or in
            a bucket, from where it is fetched); a Hugging Face folder; hf://OWNER/NAME[@REVISION], which is fetched;
            models:/... or runs:/... of MLflow.

    Raises:
        UserError: nothing of the kind is there, or it cannot be fetched.
    """
    if hub_models.is_hub_address(text):
        folder = hub_models.download(text)
        if not huggingface.is_exported(folder):
            raise UserError(f"{text} has no {huggingface.CONFIG_FILE}; give the address of a LlamaForCausalLM")
        return folder
    if text.startswith(_MLFLOW_SCHEMES):
        from pipeline.pretrained.pyfunc import find_model

        return find_model(text, working_folder())
    if in_bucket(text):
        return local_checkpoint(text)
    path = resolve_path(text)
    return path if huggingface.is_exported(path) else local_checkpoint(path)


def find_questions(text: str) -> Path:
    """HellaSwag's questions, a local file or one of the hub; UserError where it is not there."""
    if text.startswith("hf://"):
        return hub_models.download_file(text)
    path = resolve_path(text)
    if not path.is_file():
        raise UserError(f"there are no HellaSwag questions at {path}; give the path of a hellaswag_val.jsonl")
    return path


def copy_questions(path: Path, run: Folder) -> str:
    """Put HellaSwag's questions into a run's folder, which every worker sees; returns their address."""
    name = f"hellaswag{path.suffix}"
    run.write(name, [path.read_bytes()])
    return f"{run}/{name}"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a resolved folder; UserError where it does not fit the model."""
    tokenizer = Tokenizer.from_file(path / TOKENIZER_FILE)
    vocab_size = huggingface.read_model_config(path).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {vocab_size:,}; mend it")
    return tokenizer


def open_model(path: Path, device: torch.device) -> Pretrained:
    """The network of a resolved folder, float32 on ``device``, and its tokenizer."""
    model = Transformer(huggingface.read_model_config(path)).to(device)
    huggingface.load_weights(path, model)
    return Pretrained(model=model.eval(), tokenizer=read_tokenizer(path))
