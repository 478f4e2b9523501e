"""Byte-level BPE: text to token ids and back, equal to GPT-2's tokenizer when given its vocabulary.

Text is UTF-8, split into pretokens by GPT-2's pattern or by cl100k's (white space, letters and numbers as in
unicode_table.py); the bytes of a pretoken are merged in the order in which the merges were learned. On disk a tokenizer
is a Hugging Face ``tokenizer.json``. References: tiktoken and `tokenizers` give the same ids
(tests/tokenizer/test_bpe.py). How it works, and how fast it is: docs/tokenizer.md.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.tokenizer.files import (
    Vocabulary,
    parse_tokenizer_json,
    read_gpt2,
    read_tokenizer_json,
    tokenizer_json,
    write_tokenizer_json,
)
from pipeline.tokenizer.kernels import encode as encode_kernels
from pipeline.tokenizer.kernels import hash_table, merge_short
from pipeline.tokenizer.patterns import MAX_TOKENS, PATTERNS, Pattern
from pipeline.tokenizer.text_buffers import (
    TextBuffer,
    Texts,
    bytes_buffer,
    guess_bytes,
    require_texts,
    shares,
    text_buffers,
    utf8,
)
from pipeline.tokenizer.workspace import Arrays, PretokenTable, merge_space, new_merges, new_scanner

END_OF_TEXT = "<|endoftext|>"
MAX_UINT16_TOKENS = 1 << 16
PATTERN_NUMBERS: dict[Pattern, int] = {"gpt2": encode_kernels.GPT2, "cl100k": encode_kernels.CL100K}

# The cache of pretokens, one per thread that encodes. A slot takes 44 bytes: its entry, and shares of the bytes of long
# pretokens and of the ids that do not fit into an entry. It starts with FIRST_SLOTS and then grows to CACHE_SLOTS in
# one step; when 0.6 of those are used, it is emptied. The default, 44 MiB, holds 629,145 distinct pretokens, about as
# many as 0.9 GB of English has.
CACHE_SLOTS = 1 << 20
FIRST_SLOTS = 1 << 16
CACHE_LOAD = 0.6
KEPT_BYTES_PER_SLOT = 8
SPILLED_IDS_PER_SLOT = 1
MIN_CACHE_SLOTS = 1 << 12  # room for the pretokens of one scan

SLACK_IDS = 8  # the kernel writes 16 bytes at a time
BYTES_PER_TOKEN = 3  # for the first size of the output; English has 4

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Tokenizer:
    """A byte-level BPE tokenizer. Immutable, safe to share between threads, picklable, cheap to create (no compiling).

    ``special_tokens`` maps the text of a special token to its id. Text turns into one only in ``encode`` and only where
    the caller allows it by name.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: Sequence[tuple[int, int]],
        special_tokens: Mapping[str, int],
        *,
        pattern: Pattern = "gpt2",
        cache_slots: int = CACHE_SLOTS,
    ) -> None:
        """tokens: bytes of every id. merges: pairs of ids, first learned first. ValueError where they do not fit.

        pattern: how text is split into pretokens. cache_slots: a power of two; every thread that encodes has a cache of
        44 bytes a slot. Encoding is slower for texts whose distinct pretokens do not fit into 0.6 of the slots.
        """
        if pattern not in PATTERN_NUMBERS:
            raise ValueError(f"has the pattern {pattern!r}, not one of {', '.join(PATTERN_NUMBERS)}")
        if cache_slots < MIN_CACHE_SLOTS or cache_slots & (cache_slots - 1):
            raise ValueError(f"is to have {cache_slots} cache_slots, not a power of two from {MIN_CACHE_SLOTS} on")
        self._vocabulary = Vocabulary(list(tokens), list(merges), dict(special_tokens), pattern)
        self._cache_slots = cache_slots
        self._byte_ids, self._merged_ids = _check(self._vocabulary)
        self._workspaces: list[_Workspace] = []  # as many as threads have been encoding at a time

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``; UserError if it is missing, broken or does more than byte-level BPE."""
        return cls._from_vocabulary(read_tokenizer_json(Path(path)), path)

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Tokenizer:
        """Read the content of a ``tokenizer.json``; errors as for from_file, with ``name`` in place of the path."""
        return cls._from_vocabulary(parse_tokenizer_json(content, name), name)

    @classmethod
    def from_gpt2(cls, vocab_json: str | Path, merges_txt: str | Path) -> Tokenizer:
        """Read GPT-2's published files; ``<|endoftext|>`` is the special token."""
        return cls._from_vocabulary(read_gpt2(Path(vocab_json), Path(merges_txt), END_OF_TEXT), vocab_json)

    @classmethod
    def _from_vocabulary(cls, vocabulary: Vocabulary, path: str | Path) -> Tokenizer:
        try:
            return cls(vocabulary.tokens, vocabulary.merges, vocabulary.special_tokens, pattern=vocabulary.pattern)
        except ValueError as error:
            raise UserError(f"{path} {error}; mend the file") from error

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling: all but the working memory, which holds addresses."""
        return {name: value for name, value in self.__dict__.items() if name != "_merges"} | {"_workspaces": []}

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, pattern={self.pattern!r}, special_tokens={self.special_tokens})"
        )

    def to_json(self) -> str:
        """The content of the file that ``save`` writes."""
        return tokenizer_json(self._vocabulary)

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json`` as `tokenizers` and `transformers` read it: complete or not at all.

        The bytes are a function of the vocabulary alone.
        """
        write_tokenizer_json(Path(path), self._vocabulary)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._vocabulary.tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text of every special token -> its id."""
        return dict(self._vocabulary.special_tokens)

    @property
    def pattern(self) -> Pattern:
        """Name of the pattern that splits text into pretokens; patterns.PATTERNS has the expressions."""
        return self._vocabulary.pattern

    @property
    def eot_id(self) -> int:
        """Id of ``<|endoftext|>``, which opens every document."""
        if END_OF_TEXT not in self._vocabulary.special_tokens:
            raise UserError(f"the tokenizer has no special token {END_OF_TEXT}; give one that has")
        return self._vocabulary.special_tokens[END_OF_TEXT]

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """uint16 up to 65,536 ids, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= MAX_UINT16_TOKENS else np.uint32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over the pattern, the bytes of every token, the merges and the special tokens."""
        content = {
            "pattern": PATTERNS[self.pattern],
            "tokens": [token.hex() for token in self._vocabulary.tokens],
            "merges": self._vocabulary.merges,
            "special_tokens": self._vocabulary.special_tokens,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = frozenset()) -> list[int]:
        """Ids of a text; the special tokens named in allowed_special are recognized in it, the longest first.

        A lone surrogate, which UTF-8 cannot write, counts as U+FFFD.
        """
        if not allowed_special:
            return self.encode_bytes(utf8(text))
        unknown = sorted(set(allowed_special) - self._vocabulary.special_tokens.keys())
        if unknown:
            raise UserError(
                f"allowed_special names {unknown[0]!r}, but the special tokens are {sorted(self.special_tokens)}"
            )
        names = sorted(allowed_special, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if part in names:
                ids.append(self._vocabulary.special_tokens[part])
            else:
                ids += self.encode_bytes(utf8(part))
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that need not be UTF-8.

        A byte that is no part of a character counts as one that is neither letter, number nor white space.
        """
        ids, _ = self._encode([bytes_buffer(data)], 1, len(data), None)
        return ids.tolist()

    def encode_batch(self, texts: Texts, *, num_threads: int = 1) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Concatenated ids of documents, and where each begins: document i is ids[offsets[i]:offsets[i + 1]].

        texts: a list of str, or an Arrow array as for encode_arrow; a null is refused with a UserError. Returns ids
        (uint16, or uint32 above 65,536 ids) and offsets (int64, one more than documents).
        """
        require_texts(texts)
        return self._encode_parallel(texts, None, num_threads)

    def encode_arrow(
        self, texts: pa.Array | pa.ChunkedArray, *, prefix: int | None = None, num_threads: int = 1
    ) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Encode an Arrow array of string, large_string or string_view, plain, sliced or chunked, without copying it.

        Returns ids and offsets like encode_batch. A null is an empty text. prefix: an id to put before every document.
        The GIL is released: num_threads of this call, or threads of the caller, encode in parallel, each with a cache
        of its own.
        """
        if prefix is not None and not 0 <= prefix < self.vocab_size:
            raise UserError(f"prefix is {prefix}; it must be an id from 0 to {self.vocab_size - 1}")
        return self._encode_parallel(texts, prefix, num_threads)

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_batch(self, ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> list[str]:
        """Texts of the documents ids[offsets[i]:offsets[i + 1]], as encode_batch returned them."""
        return [self.decode(ids[start:stop]) for start, stop in itertools.pairwise(offsets.tolist())]

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[Any]) -> bytes:
        """Bytes of ids, special tokens as their text; UserError on an id outside the vocabulary."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if array.size == 0:
            return b""
        lowest, highest = array.min(), array.max()
        if array.dtype.kind not in "iu" or lowest < 0 or highest >= self.vocab_size:
            raise UserError(
                f"ids from {lowest} to {highest} cannot be decoded; they must be integers below {self.vocab_size}"
            )
        return b"".join(map(self._vocabulary.tokens.__getitem__, array.ravel().tolist()))

    def _encode_parallel(self, texts: Texts, prefix: int | None, num_threads: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        if num_threads < 1:
            raise UserError(f"num_threads is {num_threads}; it must be positive")
        if num_threads == 1:
            return self._encode(text_buffers(texts), len(texts), guess_bytes(texts), prefix)

        def encode(part: list[TextBuffer]) -> tuple[Ids, npt.NDArray[np.int64]]:
            num_documents = sum(buffer.stops.size for buffer in part)
            return self._encode(part, num_documents, sum(buffer.num_bytes for buffer in part), prefix)

        with ThreadPoolExecutor(num_threads) as pool:
            results = list(pool.map(encode, shares(text_buffers(texts), num_threads)))
        sizes = itertools.accumulate((ids.size for ids, _ in results), initial=0)
        offsets = [part[1:] + size for (_, part), size in zip(results, sizes, strict=False)]
        no_ids = np.empty(0, self.id_dtype)
        return np.concatenate([no_ids, *(ids for ids, _ in results)]), np.concatenate([np.zeros(1, np.int64), *offsets])

    def _encode(
        self, buffers: Iterable[TextBuffer], num_documents: int, guessed_bytes: int, prefix: int | None
    ) -> tuple[Ids, npt.NDArray[np.int64]]:
        id_offsets = np.zeros(1 + num_documents, np.int64)
        ids = np.empty(guessed_bytes // BYTES_PER_TOKEN + num_documents + 64 + SLACK_IDS, self.id_dtype)
        cursor = np.zeros(3, np.int64)
        try:
            workspace = self._workspaces.pop()  # atomic
        except IndexError:
            workspace = self._new_workspace()
        first = 0
        for buffer in buffers:
            cursor[encode_kernels.DOCUMENT], cursor[encode_kernels.POSITION] = 0, -1
            part = id_offsets[first : first + buffer.stops.size + 1]
            while True:
                encoder = workspace.encoder._replace(
                    table=workspace.pretokens.view, prefix=-1 if prefix is None else prefix
                )
                output = (ids.ctypes.data, ids.size - SLACK_IDS)
                missing = encode_kernels.encode_documents(
                    buffer.address, buffer.starts, buffer.stops, encoder, cursor, output, part
                )
                if missing == 0:
                    break
                if missing == encode_kernels.TABLE_IS_FULL:
                    workspace.make_room(self._cache_slots)
                else:
                    ids.resize(ids.size + max(ids.size // 2, missing), refcheck=False)
            first += buffer.stops.size
        self._workspaces.append(workspace)
        ids.resize(int(cursor[encode_kernels.WRITTEN]), refcheck=False)
        return ids, id_offsets

    def _new_workspace(self) -> _Workspace:
        """An empty cache and working memory for one thread; all threads share the merges."""
        pretokens = PretokenTable(
            min(FIRST_SLOTS, self._cache_slots),
            load=CACHE_LOAD,
            kept_room=max(self._cache_slots * KEPT_BYTES_PER_SLOT, encode_kernels.MOST_CACHED_BYTES),
            spilled_room=max(self._cache_slots * SPILLED_IDS_PER_SLOT, encode_kernels.MOST_CACHED_BYTES),
        )
        scanner, scanner_arrays = new_scanner(encode_kernels.MAX_PRETOKENS)
        batch = np.empty(hash_table.BATCH_WORDS, np.uint64)
        (ids, ranks), space = merge_space()
        merges, merge_arrays = self._merges
        encoder = encode_kernels.Encoder(
            pattern=PATTERN_NUMBERS[self.pattern],
            scanner=scanner,
            merges=merges,
            table=pretokens.view,
            id_shift=self.id_dtype.itemsize.bit_length() - 1,
            prefix=-1,
            batch=batch.ctypes.data,
            ids=ids,
            ranks=ranks,
        )
        return _Workspace(encoder, pretokens, [*scanner_arrays, batch, *space, *merge_arrays])

    @functools.cached_property
    def _merges(self) -> tuple[merge_short.Merges, Arrays]:
        return new_merges(self._vocabulary.tokens, self._vocabulary.merges, self._byte_ids, self._merged_ids)


class _Workspace(NamedTuple):
    """Working memory of one thread: addresses for the kernels, and the arrays that they point into."""

    encoder: encode_kernels.Encoder
    pretokens: PretokenTable
    arrays: Arrays

    def make_room(self, most_slots: int) -> None:
        """Grow the cache to most_slots, or empty it where it has as many.

        It grows in one step and early: the few pretokens in it are the frequent ones, and in a table that is almost
        empty they are stored in the slot that is looked at first.
        """
        if self.pretokens.num_slots < most_slots:
            self.pretokens.grow(most_slots // self.pretokens.num_slots)
        else:
            self.pretokens.clear()


def warm_up() -> None:
    """Compile the kernels of encoding unless they are cached. A driver calls it before its workers start."""
    tokens = [bytes([byte]) for byte in range(256)]
    Tokenizer([*tokens, b"ab"], [(97, 98)], {}).encode("ab " + 200 * "a" + " " + 300 * "b")
    PretokenTable(MIN_CACHE_SLOTS, load=CACHE_LOAD, kept_room=0, spilled_room=0).grow(2)


def pretokenize(data: bytes, pattern: Pattern = "gpt2") -> list[bytes]:
    """The pretokens of UTF-8 text in order; joined they are ``data``. For looking at what is merged."""
    scanner, _arrays = new_scanner(encode_kernels.MAX_PRETOKENS)
    buffer = bytes_buffer(data)
    ends = np.empty(len(data), np.int64)
    count = encode_kernels.pretokenize(buffer.address, len(data), PATTERN_NUMBERS[pattern], scanner, ends)
    return [data[start:stop] for start, stop in itertools.pairwise([0, *ends[:count].tolist()])]


def _check(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids of the 256 bytes, and the id that every merge produces; ValueError where the parts do not fit together."""
    tokens, merges, special_tokens, _ = vocabulary
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"has {len(tokens)} tokens, more than {MAX_TOKENS}")
    special_ids = set(special_tokens.values())
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    for name, token_id in special_tokens.items():
        is_there = name and 0 <= token_id < len(tokens) and tokens[token_id] == name.encode()
        if not is_there or (len(ids) != len(tokens) and tokens.count(name.encode()) > 1):
            raise ValueError(f"has the special token {name!r} that is empty, an ordinary token too, or not at its id")
    if len(ids) != len(tokens) or len(special_ids) != len(special_tokens):
        raise ValueError("gives the same bytes two ids, or two special tokens the same id")
    for token_id in special_ids:
        del ids[tokens[token_id]]
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(f"has no token for the byte {missing[0]}")
    merged_ids = [ids.get(tokens[left] + tokens[right]) for left, right in merges]
    if None in merged_ids or not special_ids.isdisjoint(itertools.chain.from_iterable(merges)):
        left, right = next(
            pair for pair, merged in zip(merges, merged_ids, strict=True) if merged is None or special_ids & {*pair}
        )
        raise ValueError(f"merges {tokens[left]!r} and {tokens[right]!r} to something that is not in its vocabulary")
    if len(set(merges)) != len(merges):
        raise ValueError("lists a merge twice")
    return [ids[bytes([byte])] for byte in range(256)], [merged for merged in merged_ids if merged is not None]
