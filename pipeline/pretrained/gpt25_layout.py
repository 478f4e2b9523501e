"""The layout of the published GPT-2.5, hf://itskoma/MyGPT (model_type "gpt2.5"): our network under other names.

    config.json    context_length, num_layers, num_heads, d_model, d_ff, theta, and Llama's names for the same

    PREFIXemb.weight              embedding and, being tied, output      PREFIXnorm.weight, PREFIXlinear.weight
    PREFIXtblocks.N.norm_att.weight  norm_ff.weight
    PREFIXtblocks.N.mhsa.Wq.weight  Wk  Wv  Wo
    PREFIXtblocks.N.ffn.w1        gate    ffn.w3 up    ffn.w2 down
    PREFIXtblocks.N.mhsa.rope.cos  sin    tables of the rotary positions, (T, K/2)

Where blocks begin is read from the names, and what lies outside of them is told apart by its shape; ``.weight`` may be
there or not. The code that such a folder carries is neither fetched nor run.

Its rotary positions turn neighbours, (2i, 2i + 1), ours and Llama's turn (i, i + K/2): the rows of a head's query and
key matrices are put into another order on the way in, even ones before odd ones. Scores are sums over a head's width,
so the network computes the same.

Shapes: T context length, D model, H heads, K head dim.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import RotaryEmbedding
from pipeline.errors import UserError
from pipeline.pretrained.tensor_files import TensorFiles

_PARTS = {
    "attention_norm": "norm_att",
    "attention.q_proj": "mhsa.Wq",
    "attention.k_proj": "mhsa.Wk",
    "attention.v_proj": "mhsa.Wv",
    "attention.o_proj": "mhsa.Wo",
    "feed_forward_norm": "norm_ff",
    "feed_forward.gate_proj": "ffn.w1",
    "feed_forward.up_proj": "ffn.w3",
    "feed_forward.down_proj": "ffn.w2",
}
_TABLES = ("mhsa.rope.cos", "mhsa.rope.sin")
_QUERY_MATRIX = re.compile(r"(?P<blocks>.+\.)\d+\.mhsa\.Wq")
_OUTPUT_NAMES = ("linear", "lm_head", "output")
_TABLE_TOLERANCE = 0.01  # of a cosine: bfloat16 rounds it by 0.004, another theta moves it by up to 2


class TensorNames:
    """What the tensors of a folder of this layout are called.

    Raises:
        UserError: a tensor that such a network needs is not found.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig) -> None:
        self._path = files.path
        self._names = {name.removesuffix(".weight"): name for name in files.shapes}
        blocks = {match["blocks"] for name in self._names if (match := _QUERY_MATRIX.fullmatch(name))}
        if len(blocks) != 1:
            found = f"tensors called {' and '.join(sorted(blocks))}N.mhsa.Wq" if blocks else "no tensor N.mhsa.Wq"
            raise UserError(f"{files.path} has {found}; a model of type gpt2.5 has one row of blocks with one each")
        (start,) = blocks
        self.ours = self._outside_blocks(files, start, is_tied=config.tie_embeddings)
        """Our name of each weight -> its name in the files."""
        numbers = range(config.num_layers)
        for number in numbers:
            parts = {ours: f"{start}{number}.{theirs}" for ours, theirs in _PARTS.items()}
            self.ours |= {f"blocks.{number}.{ours}.weight": self._names.get(name, name) for ours, name in parts.items()}
        self.tables = {f"{start}{number}.{table}" for number in numbers for table in _TABLES} & files.shapes.keys()
        """Names of the tables of cosines and sines; there need not be any."""

    def _outside_blocks(self, files: TensorFiles, start: str, *, is_tied: bool) -> dict[str, str]:
        """Our names of embedding, norm and output -> theirs."""
        outside = [name for name in self._names if not name.startswith(start)]
        vectors = [name for name in outside if len(files.shapes[self._names[name]]) == 1]
        matrices = [name for name in outside if len(files.shapes[self._names[name]]) == 2]
        heads = [name for name in matrices if name.rpartition(".")[2] in _OUTPUT_NAMES]
        if len(matrices) == 1:
            heads = []  # the one matrix is both, under either name
        embeddings = [name for name in matrices if name not in heads]
        self._require_one("norm behind its blocks", "vector", vectors)
        self._require_one("embedding", "matrix", embeddings)
        if heads or not is_tied:
            self._require_one("output matrix", f"matrix called {' or '.join(_OUTPUT_NAMES)}", heads)
        self.tied_copy = self._names[heads[0]] if heads and is_tied else None
        """Name of a second copy of the embedding, as output matrix."""
        found = {"embedding": embeddings, "norm": vectors, "output": [] if is_tied else heads}
        return {f"{ours}.weight": self._names[names[0]] for ours, names in found.items() if names}

    def _require_one(self, what: str, kind: str, names: list[str]) -> None:
        if len(names) != 1:
            found = f"{len(names)}: {', '.join(sorted(names)[:4])}" if names else "none"
            raise UserError(f"{self._path} must have one {kind} outside of its blocks as {what}, but has {found}")


def check_copies(files: TensorFiles, names: TensorNames, config: ModelConfig) -> None:
    """Raise a UserError where the tables or a second copy of the embedding are not those of this config.

    The published code computes with what lies in the file, not with what its config.json says.
    """
    if names.tables:
        _check_tables(files, names, config)
    if names.tied_copy and not torch.equal(files.read(names.tied_copy), files.read(names.ours["embedding.weight"])):
        raise UserError(
            f"{files.path} says that {names.tied_copy} is its embedding, but the two differ; say in its config.json "
            "that tie_word_embeddings is false"
        )


def _check_tables(files: TensorFiles, names: TensorNames, config: ModelConfig) -> None:
    files.check_shapes(dict.fromkeys(sorted(names.tables), (config.context_length, config.head_dim // 2)))
    rotation = RotaryEmbedding(config.head_dim, config.theta).angles(0, config.context_length, torch.device("cpu"))
    for name in sorted(names.tables):
        expected = rotation.cos if name.endswith(".cos") else rotation.sin
        if not (files.read(name).float() - expected).abs().max() <= _TABLE_TOLERANCE:
            raise UserError(
                f"{files.path} has positions in {name} that are not of theta {config.theta:g}; mend its config.json"
            )


def converted(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The tensor of the weight that we call ``name``, as our network needs it."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return in_halves(tensor, config.num_heads)
    return tensor


def in_halves(matrix: Tensor, num_heads: int) -> Tensor:
    """(H K, D), whose heads have their pairs at (2i, 2i + 1) -> the same with the pairs at (i, i + K/2)."""
    pairs = matrix.view(num_heads, -1, 2, matrix.shape[-1])  # (H, K/2, 2, D)
    return pairs.transpose(1, 2).reshape(matrix.shape)
