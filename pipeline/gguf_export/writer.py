"""A model as one GGUF file, which llama.cpp, ollama and LM Studio run. One tensor is in memory at a time.

The file holds the weights (layout.py), the tokenizer and the chat template (vocabulary.py). Padding rows of the
vocabulary are left out, and so is the output matrix of a tied model: llama.cpp takes the embedding for it. The proof
against llama.cpp itself is tests/gguf_export/test_llama_cpp.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from model.config import ModelConfig
from pipeline.conversations.templates import Chat
from pipeline.gguf_export import layout, vocabulary
from pipeline.gguf_export.layout import NumberFormat
from pipeline.gguf_export.modelfile import MODELFILE, modelfile
from pipeline.tokenizer.bpe import Tokenizer

_SHORT: dict[NumberFormat, str] = {"float32": "f32", "bf16": "bf16", "q8_0": "q8_0"}


def file_name(number_format: NumberFormat) -> str:
    """model-q8_0.gguf: ollama and the hub read the number format off the end of the name."""
    return f"model-{_SHORT[number_format]}.gguf"


def write_gguf(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    chat: Chat | None,
    name: str,
    number_format: NumberFormat,
) -> dict[str, int]:
    """Write the model and its Modelfile into ``folder``.

    Args:
        tensors: our name and the tensor of every weight in the order of ``shapes``, with or without padding rows.
        shapes: our name and the shape of every weight, without padding rows.
        name: of the model, for people.

    Returns:
        The name of the GGUF file and its size in bytes.

    Raises:
        UserError: llama.cpp cannot have this tokenizer, or the number format does not fit the network.
    """
    layout.check_rows(config, number_format)
    file = folder / file_name(number_format)
    writer = gguf.GGUFWriter(file, layout.architecture(config))
    layout.add_metadata(writer, config, number_format, name)
    vocabulary.add_tokenizer(writer, tokenizer, config.vocab_size, chat)
    types = {weight: layout.tensor_type(shape, number_format) for weight, shape in shapes.items()}
    for weight, shape in shapes.items():
        size = layout.num_bytes(shape, types[weight])
        writer.add_tensor_info(layout.tensor_name(weight), shape, np.dtype(np.float32), size, types[weight])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, shape in shapes.items():
            found, tensor = next(tensors)
            assert found == weight
            writer.write_tensor_data(layout.converted(weight, tensor[: shape[0]], config, types[weight]))
            del tensor
    finally:
        writer.close()
    content = modelfile(file.name, config.context_length, chat, tokenizer.end_of_text)
    (folder / MODELFILE).write_text(content, encoding="utf-8")
    return {file.name: file.stat().st_size}
