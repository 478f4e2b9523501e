"""The tokenizer of a folder, which may lie in a bucket."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.storage.folders import Folder
from pipeline.tokenizer.bpe import Tokenizer

TOKENIZER_NAME = "tokenizer.json"


def load_tokenizer(folder: Folder) -> Tokenizer:
    """The folder's tokenizer; UserError where it has none."""
    try:
        content = folder.read(TOKENIZER_NAME)
    except FileNotFoundError:
        raise UserError(f"{folder}/{TOKENIZER_NAME} is missing; run the job that wrote the folder again") from None
    return Tokenizer.from_json(content, f"{folder}/{TOKENIZER_NAME}")


def save_tokenizer(folder: Folder, tokenizer: Tokenizer) -> None:
    """Write it as the folder's tokenizer."""
    folder.write(TOKENIZER_NAME, [tokenizer.to_json().encode()])
