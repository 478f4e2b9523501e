"""The Hugging Face folder of a model: Llama's or Qwen3's config.json, safetensors, tokenizer.json. Read and written.

    <folder>/
        config.json                    shape of a LlamaForCausalLM, with norms of queries and keys Qwen3ForCausalLM
        model.safetensors              weights; above a size model-00001-of-00003.safetensors, ..., and an index
        tokenizer.json                 ours as it is;  tokenizer_config.json: which of its ids are special
        chat_template.jinja            of a model that chats only: how its messages become text
        generation_config.json         end of text and of an answer, the recipe's sampling
        README.md                      model card (model_card.py)
        gpt25.json                     run and step of the weights; marks the folder as an export of this project

The network is that of Llama or, with qk_norm, that of Qwen3, tensor by tensor: the export renames them and leaves out
the vocabulary's padding rows.
One tensor is in memory at a time, whatever the size of the model and the number of ranks that wrote its checkpoint.
transformers, lm-evaluation-harness and llama.cpp's converter read the folder (tests/pretrained/test_huggingface.py).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.pretrained import gpt25_layout
from pipeline.pretrained.folder_config import GPT25, read_model_config
from pipeline.pretrained.tensor_files import INDEX_FILE, WEIGHTS_FILE, TensorFiles, open_tensors, read_json

CONFIG_FILE = "config.json"
NOTE_FILE = "gpt25.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

MOST_CONTEXT = 1 << 20
"""Tokens that a model may see at once; no tensor tells how many, and generation keeps a table of them."""

_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_VOCABULARY_MATRICES = ("embedding.weight", "output.weight")
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def llama_name(name: str) -> str:
    """blocks.0.attention.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    first, _, rest = name.partition(".")
    if first != "blocks":
        return f"{_TOP_NAMES[first]}.{rest}"
    number, part, rest = rest.split(".", 2)
    return f"model.layers.{number}.{_BLOCK_NAMES[part]}.{rest}"


def is_exported(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face folder."""
    return (path / CONFIG_FILE).is_file()


def is_published_gpt25(path: Path) -> bool:
    """Whether the Hugging Face folder ``path`` has the layout of the published GPT-2.5 (gpt25_layout.py)."""
    return _is_gpt25(read_json(path / CONFIG_FILE))


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter; no memory is allocated for them."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def exported_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter as it is exported, without the padding rows of the vocabulary."""
    return {
        name: (config.vocab_size, *shape[1:]) if name in _VOCABULARY_MATRICES else shape
        for name, shape in weight_shapes(config).items()
    }


def read_config(path: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, after the headers of its weights were found to agree with it.

    Raises:
        UserError: a network that is not ours: other architecture, grouped heads, biases, scaled positions; weights that
            are not those of the config.json.
    """
    values = read_json(path / CONFIG_FILE)
    config = read_model_config(path / CONFIG_FILE, values)
    with open_tensors(path) as files:
        refuse_larger(path / CONFIG_FILE, config, files.shapes)
        _find_tensors(files, config, values)
        if _is_gpt25(values):
            gpt25_layout.check_copies(files, gpt25_layout.TensorNames(files, config), config)
    return config


def read_eot_id(path: Path) -> int | None:
    """The id that ends a text by the folder's config; None where it names none, or several."""
    found = read_json(path / CONFIG_FILE).get("eos_token_id")
    return found if type(found) is int else None


def read_weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our name and the tensor of every weight in the folder ``path``, in the model's order, without padding rows.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, too many or of another shape.
    """
    values = read_json(path / CONFIG_FILE)
    with open_tensors(path) as files:
        for name, theirs in _find_tensors(files, config, values).items():
            tensor = files.read(theirs)
            yield name, gpt25_layout.converted(name, tensor, config) if _is_gpt25(values) else tensor


def write_weights(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> dict[str, int]:
    """Write weights as safetensors into the folder ``path``, one tensor in memory at a time.

    Args:
        tensors: name and tensor of every weight in the model's order, with or without padding rows.
        max_file_bytes: a further file is begun where one would become larger than this; a tensor is never split.

    Returns:
        The name of every file and its size in bytes.
    """
    shapes = exported_shapes(config)
    parts = _split(shapes, dtype.itemsize, max_file_bytes)
    several = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = several if len(parts) > 1 else [WEIGHTS_FILE]
    for file_name, part in zip(names, parts, strict=True):
        with (path / file_name).open("wb") as file:
            _write_header(file, {llama_name(name): shapes[name] for name in part}, dtype)
            for name in part:
                found, tensor = next(tensors)
                assert found == name
                _write_tensor(file, tensor[: shapes[name][0]], dtype)
                del tensor
    if len(parts) > 1:
        weight_map = {llama_name(name): file for file, part in zip(names, parts, strict=True) for name in part}
        total = sum(_num_bytes(shape, dtype.itemsize) for shape in shapes.values())
        write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {name: (path / name).stat().st_size for name in names}


def config_values(config: ModelConfig, *, dtype: torch.dtype, eot_id: int) -> dict[str, Any]:
    """Content of config.json for transformers 4 and 5, vLLM and llama.cpp."""
    if config.qk_norm:
        kind: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        more: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None}
    else:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        more = {"mlp_bias": False}
    return {
        **kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "attention_bias": False,
        **more,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def tokenizer_config(end_of_text: str, context_length: int, *, chats: bool) -> dict[str, Any]:
    """Content of tokenizer_config.json. As with our tokenizer, text is never parsed into special tokens.

    But for a model that chats: transformers renders its messages as one text, whose special tokens have to be parsed.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": None,
        "pad_token": None,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not chats,
    }


def generation_config(eot_id: int, *, answer_end_id: int | None = None) -> dict[str, Any]:
    """Content of generation_config.json: the published sampling settings and the ids that end a text.

    Args:
        answer_end_id: of the token that ends an answer in a chat; None for a model that does not chat.
    """
    ends = eot_id if answer_end_id in (None, eot_id) else [answer_end_id, eot_id]
    return {"bos_token_id": eot_id, "eos_token_id": ends, "do_sample": True, "temperature": 0.8, "top_p": 0.9}


def read_note(path: Path) -> dict[str, Any]:
    """Content of gpt25.json of an exported folder; empty for the folder of another project."""
    return read_json(path / NOTE_FILE) if (path / NOTE_FILE).is_file() else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _is_gpt25(values: dict[str, Any]) -> bool:
    return values.get("model_type") == GPT25


def _find_tensors(files: TensorFiles, config: ModelConfig, values: dict[str, Any]) -> dict[str, str]:
    """Our name of every weight, in the model's order -> its name in the files; UserError unless all of them fit."""
    shapes = exported_shapes(config)
    if _is_gpt25(values):
        found = gpt25_layout.TensorNames(files, config)
        names, others = found.ours, {*found.tables, found.tied_copy or ""}
        advice = "give a folder that the published code of GPT-2.5 wrote"
    else:
        names = {name: llama_name(name) for name in shapes}
        # Where the matrices are tied, transformers ignores an lm_head.weight that is there nevertheless, and so do we.
        others = {"lm_head.weight"}
        advice = "give the folder of a LlamaForCausalLM or a Qwen3ForCausalLM without biases or adapters"
    files.check({names[name]: shape for name, shape in shapes.items()}, others=others, advice=advice)
    return {name: names[name] for name in shapes}


def refuse_larger(file: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError for a config far beyond its weights, before so much as the shapes of its network are built.

    Args:
        file: where the config comes from, for messages.
        shapes: name and shape of each tensor, by the headers of the files.
    """
    most_elements = max(map(math.prod, shapes.values()), default=0)
    limits = dict.fromkeys(("vocab_size", "d_model", "d_ff"), most_elements) | {"num_layers": len(shapes)}
    for name, most in limits.items():
        if (asked := getattr(config, name)) > most:
            raise UserError(
                f"{file} describes a network with {name} {asked:,}, for which the weights beside it are far too small; "
                "fetch the folder again"
            )
    if config.context_length > MOST_CONTEXT:
        raise UserError(
            f"{file} describes a network with context_length {config.context_length:,}; the most is {MOST_CONTEXT:,}"
        )


def _split(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most ``max_bytes``; a larger tensor forms a group of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _num_bytes(shape, itemsize)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _num_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return int(torch.Size(shape).numel()) * itemsize


def _write_header(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Write the header of a safetensors file: its length (8 bytes, little-endian), then JSON; the data follows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + _num_bytes(shape, dtype.itemsize)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    bits = tensor.to(dtype).contiguous().view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    file.write(bits.numpy().data)
