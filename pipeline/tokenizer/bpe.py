"""Byte-level BPE: text to token ids and back, equal to GPT-2's tokenizer when given its vocabulary.

Text is UTF-8, split into pretokens by GPT-2's pattern or by cl100k's (white space, letters and numbers as in
unicode_table.py); the bytes of a pretoken are merged in the order in which the merges were learned. On disk a tokenizer
is a Hugging Face ``tokenizer.json``. References: tiktoken and `tokenizers` give the same ids
(tests/tokenizer/test_bpe.py). How it works, and how fast it is: docs/tokenizer.md.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.tokenizer.files import (
    parse_tokenizer_json,
    read_gpt2,
    read_tokenizer_json,
    tokenizer_json,
    write_tokenizer_json,
)
from pipeline.tokenizer.kernels import encode as encode_kernels
from pipeline.tokenizer.kernels import hash_table, merge_short
from pipeline.tokenizer.patterns import PATTERNS, Pattern
from pipeline.tokenizer.special_tokens import Names, SpecialTokens, safe_parts
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
from pipeline.tokenizer.vocabulary import Vocabulary, check_vocabulary
from pipeline.tokenizer.workspace import Arrays, PretokenTable, Workspace, merge_space, new_merges, new_scanner

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
    the caller allows it by name, or all of them. An id without a token (a hole, as cl100k_base has them) has no bytes.
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
        """tokens: bytes of every id, b"" for an id without a token. merges: pairs of ids, first learned first. Raises
        ValueError where they do not fit.

        pattern: how text is split into pretokens. cache_slots: a power of two; every thread that encodes has a cache of
        44 bytes a slot. Encoding is slower for texts whose distinct pretokens do not fit into 0.6 of the slots.
        """
        if pattern not in PATTERN_NUMBERS:
            raise ValueError(f"has the pattern {pattern!r}, not one of {', '.join(PATTERN_NUMBERS)}")
        if cache_slots < MIN_CACHE_SLOTS or cache_slots & (cache_slots - 1):
            raise ValueError(f"is to have {cache_slots} cache_slots, not a power of two from {MIN_CACHE_SLOTS} on")
        self._vocabulary = Vocabulary(list(tokens), list(merges), dict(special_tokens), pattern)
        self._cache_slots = cache_slots
        self._eot_id: int | None = None
        self._byte_ids, self._merged_ids = check_vocabulary(self._vocabulary)
        self._workspaces: list[Workspace] = []  # as many as threads have been encoding at a time

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
        """Number of ids, special tokens and holes included: the highest id and one."""
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
        """Id of the token that opens every document: ``<|endoftext|>``, or what ``with_eot_id`` said."""
        if self._eot_id is not None:
            return self._eot_id
        if END_OF_TEXT not in self._vocabulary.special_tokens:
            raise UserError(
                f"the tokenizer has no special token {END_OF_TEXT}, but {sorted(self.special_tokens) or 'none'}; name "
                "the one between documents with --end_of_text_token, or give another tokenizer"
            )
        return self._vocabulary.special_tokens[END_OF_TEXT]

    @property
    def end_of_text(self) -> str:
        """The text of ``eot_id``."""
        return self.decode([self.eot_id])

    def with_eot_id(self, eot_id: int) -> Tokenizer:
        """The same tokenizer, with another token between documents; UserError where it has no such id."""
        if not 0 <= eot_id < self.vocab_size or not self._vocabulary.tokens[eot_id]:
            raise UserError(f"the tokenizer has no token with the id {eot_id}, which is to stand between documents")
        same = copy.copy(self)
        same._eot_id, same._workspaces = eot_id, []
        return same

    def with_end_of_text(self, name: str) -> Tokenizer:
        """The same tokenizer, with another special token between documents; UserError where it has none of the name."""
        if name not in self._vocabulary.special_tokens:
            raise UserError(f"the tokenizer has no special token {name!r}, but {sorted(self.special_tokens) or 'none'}")
        return self.with_eot_id(self._vocabulary.special_tokens[name])

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """The same tokenizer with these special tokens behind its last id, those that it lacks; all ids stay.

        Raises UserError where one of them is an ordinary token, or the vocabulary is as large as it can be.
        """
        vocabulary = self._vocabulary
        new = [name for name in names if name not in vocabulary.special_tokens]
        ids = {name: self.vocab_size + number for number, name in enumerate(new)}
        tokens = [*vocabulary.tokens, *(name.encode() for name in new)]
        try:
            larger = Tokenizer(
                *(tokens, vocabulary.merges, vocabulary.special_tokens | ids),
                pattern=self.pattern,
                cache_slots=self._cache_slots,
            )
        except ValueError as error:
            raise UserError(f"the tokenizer with the special tokens {', '.join(new)} {error}") from error
        larger._eot_id = self._eot_id
        return larger

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

    def encode(self, text: str, allowed_special: Names = (), disallowed_special: Names = ()) -> list[int]:
        """Ids of a text. A lone surrogate, which UTF-8 cannot write, counts as U+FFFD.

        allowed_special: special tokens that are recognized, the longest first, or "all". disallowed_special: those that
        must not occur, or "all" for all that are not allowed: a UserError names the first. By default, as in tiktoken's
        encode_ordinary, none is recognized and none is an error.
        """
        special = self._special_tokens.choose(allowed_special, disallowed_special)
        if not special:
            return self.encode_bytes(utf8(text))
        ids: list[int] = []
        for part, token_id in special.split(text):
            ids += self.encode_bytes(utf8(part)) if token_id is None else [token_id]
        return ids

    def encode_iterable(
        self, texts: Iterable[str], allowed_special: Names = (), disallowed_special: Names = ()
    ) -> Iterator[int]:
        """The ids of all texts joined, one by one, as ``encode`` gives them: for files, which yield their lines.

        Takes the memory of some 100 kB of text, or of the longest stretch without a blank behind a letter or digit.
        """
        special = self._special_tokens.choose(allowed_special, disallowed_special)
        for part in safe_parts(texts, special.names):
            yield from self.encode(part, allowed_special, disallowed_special)

    def count(self, text: str, allowed_special: Names = (), disallowed_special: Names = ()) -> int:
        """``len(encode(...))``, without a Python object for every id."""
        special = self._special_tokens.choose(allowed_special, disallowed_special)
        parts = special.split(text) if special else [(text, None)]
        return sum(self._ids(utf8(part)).size if token_id is None else 1 for part, token_id in parts)

    def count_batch(self, texts: Texts, *, num_threads: int = 1) -> npt.NDArray[np.int64]:
        """Number of ids of every document, (n,) int64; ``texts`` as for encode_batch."""
        return np.diff(self.encode_batch(texts, num_threads=num_threads)[1])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that need not be UTF-8.

        A byte that is no part of a character counts as one that is neither letter, number nor white space.
        """
        return self._ids(data).tolist()

    def _ids(self, data: bytes) -> Ids:
        return self._encode([bytes_buffer(data)], 1, len(data), None)[0]

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
        if self.holes and (hole := min(self.holes.intersection(array.ravel().tolist()), default=None)) is not None:
            raise UserError(f"the id {hole} cannot be decoded; the tokenizer has no token with this id")
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

    def _new_workspace(self) -> Workspace:
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
        return Workspace(encoder, pretokens, [*scanner_arrays, batch, *space, *merge_arrays])

    @functools.cached_property
    def holes(self) -> frozenset[int]:
        """Ids without a token."""
        return frozenset(token_id for token_id, token in enumerate(self._vocabulary.tokens) if not token)

    @functools.cached_property
    def _special_tokens(self) -> SpecialTokens:
        return SpecialTokens(self._vocabulary.special_tokens)

    @functools.cached_property
    def _merges(self) -> tuple[merge_short.Merges, Arrays]:
        return new_merges(self._vocabulary.tokens, self._vocabulary.merges, self._byte_ids, self._merged_ids)


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
