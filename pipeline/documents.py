"""What becomes of a document before it is written: to train or to val, and from text to token ids."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.bpe import Tokenizer


def split_by_hash(texts: Any, val_fraction: float) -> tuple[Any, Any]:
    """The documents of train and of val, in order: a document is val if the hash of its UTF-8 bytes says so.

    The choice depends on the text alone: copies of a document fall on one side, in whatever files and order they lie.
    ``texts``: large_string without nulls.
    """
    if len(texts) == 0 or val_fraction == 0:
        return texts, texts.slice(0, 0)
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    data = memoryview(data_buffer)
    limit = int(val_fraction * 2**64).to_bytes(8, "big")
    is_val = np.fromiter(
        (
            hashlib.sha256(data[begin:end]).digest() < limit  # the first 8 bytes decide
            for begin, end in itertools.pairwise(offsets)
        ),
        dtype=bool,
        count=len(texts),
    )
    return texts.filter(pa.array(~is_val)), texts.filter(pa.array(is_val))


def encode_documents(tokenizer: Tokenizer, texts: pa.Array) -> npt.NDArray[Any]:
    """Token ids of all documents, each behind an ``eot_id``."""
    ids, _ = tokenizer.encode_arrow(texts, prefix=tokenizer.eot_id)
    return ids
