"""The tokenizers that are compared, each behind the same three steps: prepare (not timed), encode, ids (not timed).

The jobs differ and are named: from a list of str, as users have texts, or from flat UTF-8 buffers with offsets, as
Arrow and awkward arrays hold them. Ours gives ids and offsets as numpy arrays, gigatoken the same two arrays as an
awkward array, tiktoken and `tokenizers` give lists of int. Every contender has caches of its own, empty when it is
made. The tokenizer.json that the peers load has no special tokens: text never turns into one, as in ours.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken
import tokenizers

from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import PATTERNS

try:
    import awkward
    import gigatoken
    from gigatoken.gigatoken_rs import TextFileSource
except ImportError as error:
    raise SystemExit("error: the peers are missing; install them with: pip install -e '.[benchmark]'") from error

OURS_LIST, OURS_ARROW = "ours, list[str]", "ours, Arrow"
GIGATOKEN_LIST, GIGATOKEN_BUFFERS = "gigatoken, list[str]", "gigatoken, buffers"
GIGATOKEN_POOL, GIGATOKEN_FILES = "gigatoken, list[str], pool of one thread", "gigatoken, encode_files"
TIKTOKEN, TOKENIZERS = "tiktoken", "tokenizers"

SEPARATOR = "<|between documents|>"

Encoded = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Ids of all documents, and where each begins (one more than documents)."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to encode. What prepare makes of an Arrow array goes to encode, what encode gives to ids."""

    name: str
    prepare: Callable[[Any], Any]
    encode: Callable[[Any], Any]
    ids: Callable[[Any], Encoded] = lambda result: result
    is_slow: bool = False
    """It gets a sample of the text, and no second pass."""


def contenders(tokenizer: Tokenizer, folder: Path, names: Sequence[str]) -> list[Contender]:
    """The contenders of these names, with empty caches; what they need on disk is put into folder."""
    path = folder / "peers.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        content["model"]["vocab"].pop(token["content"], None)
    path.write_text(json.dumps({**content, "added_tokens": []}))
    makers: dict[str, Callable[[], Contender]] = {
        OURS_LIST: lambda: _ours(OURS_LIST, tokenizer),
        OURS_ARROW: lambda: _ours(OURS_ARROW, tokenizer),
        GIGATOKEN_LIST: lambda: _gigatoken(GIGATOKEN_LIST, path, to_list, parallel=False),
        GIGATOKEN_POOL: lambda: _gigatoken(GIGATOKEN_POOL, path, to_list, parallel=True),
        GIGATOKEN_BUFFERS: lambda: _gigatoken(GIGATOKEN_BUFFERS, path, awkward.from_arrow, parallel=False),
        GIGATOKEN_FILES: lambda: _gigatoken_files(path),
        TIKTOKEN: lambda: _tiktoken(tokenizer),
        TOKENIZERS: lambda: _tokenizers(path),
    }
    return [makers[name]() for name in names]


def to_list(texts: Any) -> list[str]:
    """A new list: a str keeps its UTF-8 once someone asked for it, which would help whoever comes second."""
    return texts.to_pylist()


def _ours(name: str, tokenizer: Tokenizer) -> Contender:
    own = copy.copy(tokenizer)
    if name == OURS_LIST:
        return Contender(name=name, prepare=to_list, encode=own.encode_batch)
    return Contender(name=name, prepare=lambda texts: texts, encode=getattr(own, "encode_arrow", own.encode_batch))


def _gigatoken(name: str, path: Path, prepare: Callable[[Any], Any], *, parallel: bool) -> Contender:
    own = gigatoken.Tokenizer(path)
    return Contender(
        name=name, prepare=prepare, encode=lambda texts: own.encode_batch(texts, parallel=parallel), ids=awkward_ids
    )


def _gigatoken_files(path: Path) -> Contender:
    """From a text file that the system has in memory."""
    own = gigatoken.Tokenizer(path)
    file = path.with_name("texts.txt")

    def prepare(texts: Any) -> TextFileSource:
        file.write_text(SEPARATOR.join(texts.to_pylist()), encoding="utf-8", newline="")
        return TextFileSource([file], separator=SEPARATOR)

    return Contender(
        name=GIGATOKEN_FILES,
        prepare=prepare,
        encode=lambda source: own.encode_files(source, parallel=False),
        ids=awkward_ids,
    )


def awkward_ids(result: Any) -> Encoded:
    """The two arrays that gigatoken's result consists of."""
    layout = result.layout
    return np.asarray(layout.content.data), np.asarray(layout.offsets)


def _tiktoken(tokenizer: Tokenizer) -> Contender:
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    ranks = {tokenizer.decode_bytes([i]): i for i in ordinary}  # ids are ranks, in GPT-2's vocabulary as in ours
    peer = tiktoken.Encoding("peer", pat_str=PATTERNS[tokenizer.pattern], mergeable_ranks=ranks, special_tokens={})
    return Contender(
        name=TIKTOKEN,
        prepare=to_list,
        encode=lambda texts: [peer.encode_ordinary(text) for text in texts],
        ids=_list_ids,
        is_slow=True,
    )


def _tokenizers(path: Path) -> Contender:
    peer = tokenizers.Tokenizer.from_file(str(path))
    return Contender(
        name=TOKENIZERS,
        prepare=to_list,
        encode=peer.encode_batch_fast,
        ids=lambda encodings: _list_ids([encoding.ids for encoding in encodings]),
        is_slow=True,
    )


def _list_ids(documents: list[list[int]]) -> Encoded:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    return np.fromiter(itertools.chain.from_iterable(documents), np.uint32, int(offsets[-1])), offsets


def require_equal(name: str, expected: Encoded, found: Encoded, texts: Any) -> None:
    """Stop the benchmark where found, of the first documents of texts or of all, is not as expected."""
    num_documents = found[1].size - 1
    ids, offsets = expected[0], expected[1][: num_documents + 1]
    if np.array_equal(offsets, found[1]) and np.array_equal(ids[: offsets[-1]], found[0]):
        return
    for row in range(num_documents):
        ours, theirs = (part[0][part[1][row] : part[1][row + 1]] for part in (expected, found))
        if not np.array_equal(ours, theirs):
            with contextlib.suppress(IndexError):
                raise SystemExit(f"error: {name} gives other ids for document {row}: {texts[row].as_py()[:200]!r}")
    raise SystemExit(f"error: {name} gives other ids")


def num_bytes(texts: Any) -> int:
    """Of UTF-8."""
    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


def first_documents(texts: Any, limit_bytes: float) -> Any:
    """The first documents, about limit_bytes of them together, one at least."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy())
    return texts.slice(0, max(1, int(np.searchsorted(ends, limit_bytes, side="right"))))


def without_nulls(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """What encode_batch takes."""
    return texts.drop_null() if texts.null_count else texts
