"""The network as llama.cpp has it: names, metadata, the order of rows, number formats.

With qk_norm it is llama.cpp's qwen3, otherwise its llama. Both compute what ours does, with one difference: llama's
rotary positions turn neighbouring pairs of a head, ours and qwen3's turn its two halves. So the rows of llama's queries
and keys are put into another order: row 2j of a head is our row j, row 2j + 1 our row j + K/2.
Vectors stay float32: llama.cpp multiplies norms in nothing else.

H heads, K head dim, D model.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

from model.config import ModelConfig
from pipeline.errors import UserError

NumberFormat: TypeAlias = Literal["float32", "bf16", "q8_0"]

_TYPES: dict[NumberFormat, gguf.GGMLQuantizationType] = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES: dict[NumberFormat, gguf.LlamaFileType] = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_TOP_NAMES = {"embedding": "token_embd", "norm": "output_norm", "output": "output"}
_BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
_TURNED = ("attention.q_proj.weight", "attention.k_proj.weight")


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the network."""
    return "qwen3" if config.qk_norm else "llama"


def tensor_name(name: str) -> str:
    """blocks.0.attention.q_proj.weight -> blk.0.attn_q.weight."""
    first, _, rest = name.partition(".")
    if first != "blocks":
        return f"{_TOP_NAMES[first]}.{rest}"
    number, rest = rest.split(".", 1)
    part, _, kind = rest.rpartition(".")
    return f"blk.{number}.{_BLOCK_NAMES[part]}.{kind}"


def tensor_type(shape: tuple[int, ...], number_format: NumberFormat) -> gguf.GGMLQuantizationType:
    """The type that a tensor of such a shape is stored in."""
    return _TYPES[number_format] if len(shape) > 1 else gguf.GGMLQuantizationType.F32


def num_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    return math.prod(gguf.quant_shape_to_byte_shape(shape, kind))


def check_rows(config: ModelConfig, number_format: NumberFormat) -> None:
    """Raise a UserError where the rows of a matrix cannot be divided into blocks of the number format."""
    block, _ = gguf.GGML_QUANT_SIZES[_TYPES[number_format]]
    for name in ("d_model", "d_ff"):
        if (width := getattr(config, name)) % block:
            raise UserError(
                f"{number_format} stores {block} numbers of a row at a time, but {name} is {width:,}, which is no "
                f"multiple of {block}; give --dtype f32 or --dtype bf16"
            )


def converted(
    name: str, tensor: Tensor, config: ModelConfig, kind: gguf.GGMLQuantizationType
) -> npt.NDArray[np.generic]:
    """The tensor of one of our names as it is stored: rows in llama.cpp's order, in numbers of type ``kind``."""
    if not config.qk_norm and name.endswith(_TURNED):
        halves = tensor.view(config.num_heads, 2, config.head_dim // 2, -1)  # (H, 2, K/2, D)
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    stored: npt.NDArray[np.generic] = gguf.quantize(tensor.float().contiguous().numpy(), kind)
    return stored


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, number_format: NumberFormat, name: str) -> None:
    """Write down the shape of the network, the model's name and its number format."""
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[number_format])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
