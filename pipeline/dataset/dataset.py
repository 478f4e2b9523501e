"""A data set: a folder, which may be in a bucket, with the shards, their manifest and their tokenizer."""

from __future__ import annotations

from pipeline.dataset.manifest import MANIFEST_NAME, Manifest
from pipeline.errors import UserError
from pipeline.storage.folders import Folder
from pipeline.tokenizer.bpe import Tokenizer

TOKENIZER_NAME = "tokenizer.json"


def open_data(folder: Folder) -> tuple[Tokenizer, Manifest]:
    """Tokenizer and manifest of a folder of shards, checked against each other.

    Raises:
        UserError: no such data, or shards that another tokenizer made.
    """
    manifest = Manifest.load(folder)
    return load_tokenizer_of(folder, manifest), manifest


def load_tokenizer_of(folder: Folder, manifest: Manifest) -> Tokenizer:
    """The folder's tokenizer; UserError where it has none, a damaged one, or another than the one of its shards."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"the shards in {folder} were made with another tokenizer than its {TOKENIZER_NAME} (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]} against {tokenizer.fingerprint[:12]}); run the command that made "
            f"the folder again, which writes {TOKENIZER_NAME} anew"
        )
    if tokenizer.vocab_size != manifest.vocab_size:
        raise UserError(
            f"{folder}/{MANIFEST_NAME} says {manifest.vocab_size:,} ids, but its {TOKENIZER_NAME} has "
            f"{tokenizer.vocab_size:,}; run the command that made the folder again"
        )
    return tokenizer.with_eot_id(manifest.eot_id)


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
