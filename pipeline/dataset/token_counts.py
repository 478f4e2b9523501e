"""How often each token occurs, and how many bytes of text tokens are: of a stream, and of a file of foreign shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.dataset.shards import HEADER_BYTES, TokenStream, open_shard, token_dtype
from pipeline.errors import UserError
from pipeline.tokenizer.bpe import Tokenizer

Counts = npt.NDArray[np.int64]

_TOKENS_AT_ONCE = 1 << 23


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """What reading a file of tokens from end to end tells."""

    counts: Counts
    """(V,) How often each id occurs."""
    sha256: str
    """sha256 of the whole file, hexadecimal."""

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


def byte_lengths(tokenizer: Tokenizer) -> Counts:
    """(V,) Bytes of text that each token stands for; special tokens are no part of the text and have none."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token in {*range(tokenizer.vocab_size)} - tokenizer.holes - {*tokenizer.special_tokens.values()}:
        lengths[token] = len(tokenizer.decode_bytes([token]))
    return lengths


def count_tokens(stream: TokenStream, start: int = 0, stop: int | None = None) -> Counts:
    """How often each id occurs among tokens [start, stop) of a stream, (V,); by default in all of it."""
    counts = np.zeros(stream.vocab_size, dtype=np.int64)
    end = len(stream) if stop is None else stop
    for first in range(start, end, _TOKENS_AT_ONCE):
        tokens = stream.read(first, min(_TOKENS_AT_ONCE, end - first))
        counts += np.bincount(tokens, minlength=stream.vocab_size)
    return counts


def count_file(
    path: Path, where: str, *, vocab_size: int, headerless: bool = False, progress: Callable[[int], None] | None = None
) -> FileCounts:
    """Read a file of tokens once.

    Args:
        where: name of the file in messages.
        progress: called with the number of bytes that were just read.

    Raises:
        UserError: no whole file of tokens, ids too wide for the vocabulary, or an id outside it.
    """
    tokens = open_shard(path, headerless=headerless)
    require_width(where, tokens.dtype.itemsize, vocab_size)
    digest = hashlib.sha256()
    if not headerless:
        with path.open("rb") as file:
            digest.update(file.read(HEADER_BYTES))
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        part = tokens[start : start + _TOKENS_AT_ONCE]
        digest.update(part.data.cast("B"))
        if (largest := int(part.max())) >= vocab_size:
            raise UserError(
                f"{where} holds the id {largest:,}, but the tokenizer has ids below {vocab_size:,}; "
                "name the tokenizer that made the file with --tokenizer"
            )
        counts += np.bincount(part, minlength=vocab_size)
        if progress is not None:
            progress(part.nbytes)
    return FileCounts(counts=counts, sha256=digest.hexdigest())


def require_width(where: str, itemsize: int, vocab_size: int) -> None:
    """UserError where a file's tokens have another width than those of a vocabulary have in shards."""
    expected = token_dtype(vocab_size).itemsize
    if itemsize != expected:
        raise UserError(
            f"{where} holds tokens of {itemsize} bytes, but a vocabulary of {vocab_size:,} ids has tokens of "
            f"{expected}; name the tokenizer that made the file with --tokenizer"
        )
