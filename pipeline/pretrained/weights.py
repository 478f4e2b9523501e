"""The weights of a model, whether they lie in a checkpoint of ours or in a Hugging Face folder.

Which of the two a folder is, is decided here and nowhere else. One tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints.metadata import DESCRIPTION_FILE, TOKENIZER_FILE
from pipeline.errors import UserError
from pipeline.pretrained import huggingface
from pipeline.storage.folders import as_folder
from pipeline.tokenizer.bpe import Tokenizer

_FREE = ("context_length", "theta")
"""Fields of ModelConfig that no tensor depends on."""


def read_model_config(path: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder or in a checkpoint; UserError for a network that is not ours."""
    if huggingface.is_exported(path):
        return huggingface.read_config(path)
    config = checkpoint_reader.read_info(path).model_config
    found = {
        name.removeprefix("model."): shape
        for name, shape in checkpoint_reader.read_shapes(path).items()
        if name.startswith("model.")
    }
    huggingface.refuse_larger(path / DESCRIPTION_FILE, config, found)
    needed = huggingface.weight_shapes(config)
    wrong = next((name for name in {**needed, **found} if needed.get(name) != found.get(name)), None)
    if wrong is not None:
        raise UserError(
            f"checkpoint {path} is damaged: its {DESCRIPTION_FILE} asks for {wrong} of shape {needed.get(wrong)}, its "
            f"files hold {found.get(wrong)}; use an older one"
        )
    return config


def read_eot_id(path: Path) -> int | None:
    """Id of the token between documents, where the folder says that it is another than <|endoftext|>."""
    if huggingface.is_exported(path):
        return huggingface.read_eot_id(path)
    return checkpoint_reader.read_info(path).eot_id


def read_progress(path: Path) -> dict[str, Any]:
    """``step`` and ``tokens_seen`` of the training that the weights in ``path`` come from; None where it is unknown."""
    if huggingface.is_exported(path):
        note = huggingface.read_note(path)
        return {"step": note.get("step"), "tokens_seen": note.get("tokens_seen")}
    info = checkpoint_reader.read_info(path)
    return {"step": info.step, "tokens_seen": info.tokens_seen}


def check_fits(
    path: Path, expected: ModelConfig, tokenizer_fingerprint: str, *, base_fingerprint: str | None = None
) -> str:
    """Check that training can go on from the weights in ``path`` with a model ``expected`` and such a tokenizer.

    Args:
        base_fingerprint: of the tokenizer without the tokens of a chat, where these were added to it.

    Returns:
        What is not as it was there, context_length and theta at most, and added ids, for messages; empty where all is
        the same.

    Raises:
        UserError: another shape, whose first differing field is named, or another tokenizer.
    """
    found, asked = read_model_config(path).to_dict(), expected.to_dict()
    given = _tokenizer_fingerprint(path)
    is_larger = base_fingerprint == given and found["vocab_size"] < asked["vocab_size"]
    if found["vocab_size"] != asked["vocab_size"] and not is_larger:
        raise UserError(
            f"{path} holds a model of {found['vocab_size']:,} ids, but the tokenizer of --data has "
            f"{asked['vocab_size']:,}; make the data with --tokenizer {path / TOKENIZER_FILE}, or start without "
            "--checkpoint"
        )
    free = {name: asked[name] for name in (*_FREE, *(("vocab_size",) if is_larger else ()))}
    checkpoint_reader.check_shape(str(path), found | free, expected, otherwise="start without --checkpoint")
    if given != tokenizer_fingerprint and not is_larger:
        raise UserError(
            f"the weights in {path} know the ids of another tokenizer than that of --data; make the data with "
            f"--tokenizer {path / TOKENIZER_FILE}, or start without --checkpoint"
        )
    changed = [f"{name} {value:,} instead of {found[name]:,}" for name, value in free.items() if value != found[name]]
    return ", ".join([*changed, *(["the rows of new ids being the mean of all others"] if is_larger else [])])


def _tokenizer_fingerprint(path: Path) -> str:
    if huggingface.is_exported(path):
        return Tokenizer.from_file(path / TOKENIZER_FILE).fingerprint
    return checkpoint_reader.read_info(path).tokenizer_fingerprint


def fingerprint(path: Path) -> str:
    """Sha256 (hexadecimal) that changes with the weights: of a folder's files, or of a checkpoint's list of them."""
    if not huggingface.is_exported(path):
        return hashlib.sha256(checkpoint_reader.read_description(as_folder(path)).content).hexdigest()
    digest = hashlib.sha256()
    for file in sorted([path / huggingface.CONFIG_FILE, path / TOKENIZER_FILE, *path.glob("*.safetensors")]):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def load_weights(path: Path, model: Transformer) -> None:
    """Read the weights in a Hugging Face folder or a checkpoint into ``model``, sharded or not, in place.

    Every rank calls. Of a Hugging Face folder each rank reads the whole tensors, one at a time, as it does where the
    model has more ids than the folder: the row of each new one is the mean of all that are there. Padding rows are
    zero.
    """
    config = read_model_config(path)
    if not huggingface.is_exported(path) and config.vocab_size == model.config.vocab_size:
        checkpoint_reader.load_weights(path, model)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_weights(path, replace(config, context_length=model.config.context_length)):
            whole = tensor
            if name in ("embedding.weight", "output.weight"):
                whole = _with_new_rows(tensor[: config.vocab_size], model.config.vocab_size)
            _fill(parameters[name], whole)


def read_weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our name and the tensor of every weight of a folder or a checkpoint, in the model's order.

    The matrices of a checkpoint keep the padding rows of the vocabulary; a Hugging Face folder has none.
    """
    if huggingface.is_exported(path):
        yield from huggingface.read_weights(path, config)
        return
    checkpoint_reader.verify(path)
    for name, shape in huggingface.weight_shapes(config).items():
        tensor = torch.empty(shape)
        checkpoint_reader.read_tensors(path, {f"model.{name}": tensor})
        yield name, tensor


def _with_new_rows(rows: Tensor, num_rows: int) -> Tensor:
    """The rows (V, D) and behind them their mean, until there are ``num_rows``; it is summed in float64."""
    mean = rows.double().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(num_rows - len(rows), -1)])


@torch.no_grad()
def _fill(parameter: Tensor, tensor: Tensor) -> None:
    """Copy ``tensor`` into a parameter, sharded or not; further rows of the parameter become zero."""
    if not isinstance(parameter, dist.tensor.DTensor):
        parameter.zero_()
        parameter[: tensor.shape[0]].copy_(tensor)
        return
    whole = torch.zeros(parameter.shape, dtype=parameter.dtype)
    whole[: tensor.shape[0]].copy_(tensor)
    # Every rank has the whole tensor and keeps its part: nothing is sent.
    part = dist.tensor.distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    parameter.to_local().copy_(part.to_local())
