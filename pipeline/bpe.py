"""Byte-level BPE: text to token ids and back, equal to GPT-2's tokenizer when given its vocabulary.

Text is UTF-8, cut into pieces by GPT-2's pattern (white space, letters and numbers as in unicode_table.py); the bytes
of a piece are merged in the order in which the merges were learned. On disk a tokenizer is a Hugging Face
``tokenizer.json``. References: tiktoken and `tokenizers` give the same ids (tests/pipeline/test_bpe.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import bpe_kernels
from pipeline.bpe_files import Vocabulary, read_gpt2, read_tokenizer_json, write_tokenizer_json
from pipeline.errors import UserError
from pipeline.unicode_table import character_classes

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MAX_TOKENS = 1 << 24  # a rank has 24 bits in the keys of bpe_kernels.merge_long
MAX_UINT16_TOKENS = 1 << 16

# The table of pieces seen before, one per thread that encodes: 32 + 4 + 8 MiB, touched as it fills. It holds 629,145
# distinct pieces, about what 0.9 GB of English have; then it is emptied and fills again.
TABLE_SLOTS = 1 << 20
SPILLED_IDS = 1 << 20
KEPT_BYTES = 1 << 23

SLACK_IDS = 8  # the kernel writes 16 bytes at a time
BYTES_PER_TOKEN = 3  # guess for the first size of the output; English has 4

Texts: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray
Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Tokenizer:
    """A byte-level BPE tokenizer. Immutable, safe to share between threads, picklable, cheap to create (no compiling).

    ``special_tokens`` maps the text of a special token to its id. Text turns into one only in ``encode`` and only where
    the caller allows it by name.
    """

    def __init__(
        self, tokens: Sequence[bytes], merges: Sequence[tuple[int, int]], special_tokens: Mapping[str, int]
    ) -> None:
        """tokens: bytes of every id. merges: pairs of ids, first learned first. ValueError where they do not fit."""
        self._vocabulary = Vocabulary(list(tokens), list(merges), dict(special_tokens))
        self._byte_ids, self._merged_ids = _check(self._vocabulary)
        self._workspaces: list[_Workspace] = []  # as many as threads have been encoding at a time

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``; UserError if it is missing, broken or does more than byte-level BPE."""
        return cls._from_vocabulary(read_tokenizer_json(Path(path)), path)

    @classmethod
    def from_gpt2(cls, vocab_json: str | Path, merges_txt: str | Path) -> Tokenizer:
        """Read GPT-2's published files; ``<|endoftext|>`` is the special token."""
        return cls._from_vocabulary(read_gpt2(Path(vocab_json), Path(merges_txt), END_OF_TEXT), vocab_json)

    @classmethod
    def _from_vocabulary(cls, vocabulary: Vocabulary, path: str | Path) -> Tokenizer:
        try:
            return cls(*vocabulary)
        except ValueError as error:
            raise UserError(f"{path} {error}; mend the file") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._vocabulary)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

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
            "pattern": PATTERN,
            "tokens": [token.hex() for token in self._vocabulary.tokens],
            "merges": [list(pair) for pair in self._vocabulary.merges],
            "special_tokens": self._vocabulary.special_tokens,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def encode(self, text: str, allowed_special: Collection[str] = frozenset()) -> list[int]:
        """Ids of a text; the special tokens named in allowed_special are recognized in it, the longest first.

        A lone surrogate, which UTF-8 cannot write, counts as U+FFFD.
        """
        if not allowed_special:
            return self.encode_bytes(_utf8(text))
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
                ids += self.encode_bytes(_utf8(part))
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that need not be UTF-8: a byte of no character counts as one that is neither letter, number nor
        white space."""
        if not data:
            return []
        ids, _ = self._encode_buffers([_bytes_buffer(data)])
        return ids.tolist()

    def encode_batch(self, texts: Texts) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Ids of documents, one behind the other, and where each begins: document i is ids[offsets[i]:offsets[i + 1]].

        texts: a list of str, or an Arrow array (plain, sliced or chunked) of string or large_string, read in place.
        Returns ids (uint16, or uint32 above 65,536 ids) and offsets (int64, one more than documents). Nulls are refused
        with a UserError. The work is done without the GIL: threads encode in parallel, each with a table of its own.
        """
        return self._encode_buffers(list(text_buffers(texts)))

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

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

    def _encode_buffers(self, buffers: Sequence[TextBuffer]) -> tuple[Ids, npt.NDArray[np.int64]]:
        id_offsets = np.zeros(1 + sum(buffer.offsets.size - 1 for buffer in buffers), np.int64)
        num_bytes = sum(int(buffer.offsets[-1] - buffer.offsets[0]) for buffer in buffers)
        ids = np.empty(num_bytes // BYTES_PER_TOKEN + 64 + SLACK_IDS, self.id_dtype)
        cursor = np.zeros(3, np.int64)
        workspace = self._borrow_workspace()
        first = 0
        for buffer in buffers:
            num_documents = buffer.offsets.size - 1
            cursor[bpe_kernels.DOCUMENT], cursor[bpe_kernels.POSITION] = 0, buffer.offsets[0]
            part = id_offsets[first : first + num_documents + 1]
            while True:
                output = (ids.ctypes.data, ids.size - SLACK_IDS)
                missing = bpe_kernels.encode_documents(
                    buffer.address, buffer.offsets, workspace.encoder, cursor, output, part
                )
                if not missing:
                    break
                ids.resize(ids.size + max(ids.size // 2, missing), refcheck=False)
            first += num_documents
        self._workspaces.append(workspace)
        ids.resize(int(cursor[bpe_kernels.WRITTEN]), refcheck=False)
        return ids, id_offsets

    def _borrow_workspace(self) -> _Workspace:
        try:
            return self._workspaces.pop()  # atomic
        except IndexError:
            pass
        return self._new_workspace()

    def _new_workspace(self) -> _Workspace:
        """Empty table and working space of one thread; the merges are shared by all."""
        entries, used = np.zeros(TABLE_SLOTS * bpe_kernels.ENTRY_WORDS, np.uint64), np.zeros(3, np.int64)
        kept_bytes, spilled = np.empty(KEPT_BYTES, np.uint8), np.empty(SPILLED_IDS, np.uint32)
        ends, ids = np.empty(bpe_kernels.CHUNK_PIECES, np.int64), np.empty(bpe_kernels.HEAP_BYTES, np.uint32)
        pairs = np.empty(bpe_kernels.HEAP_BYTES, np.uint64)
        merges, *merge_arrays = self._merges
        table = bpe_kernels.Table(
            entries=entries.ctypes.data,
            mask=TABLE_SLOTS - 1,
            kept_bytes=kept_bytes.ctypes.data,
            kept_room=kept_bytes.size,
            spilled=spilled.ctypes.data,
            spilled_room=spilled.size,
            used=used.ctypes.data,
        )
        encoder = bpe_kernels.Encoder(
            classes=character_classes().ctypes.data,
            merges=merges,
            table=table,
            id_shift=self.id_dtype.itemsize.bit_length() - 1,
            ends=ends.ctypes.data,
            ids=ids.ctypes.data,
            pairs=pairs.ctypes.data,
        )
        return _Workspace(encoder, (entries, used, kept_bytes, spilled, ends, ids, pairs, *merge_arrays))

    @functools.cached_property
    def _merges(self) -> tuple[bpe_kernels.Merges, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """The merges as the kernels look them up, a table at most half full, and the arrays it consists of."""
        num_merges = len(self._vocabulary.merges)
        num_slots = 1 << (2 * num_merges + 1).bit_length()
        byte_ids = np.array(self._byte_ids, np.uint32)
        keys, values = np.full(num_slots, 2**64 - 1, np.uint64), np.zeros(num_slots, np.uint64)
        merges = bpe_kernels.Merges(byte_ids.ctypes.data, keys.ctypes.data, values.ctypes.data, num_slots - 1)
        pairs = np.array(self._vocabulary.merges, np.uint32).reshape(num_merges, 2)
        bpe_kernels.build_merges(pairs, np.array(self._merged_ids, np.uint32), merges)
        return merges, byte_ids, keys, values


class _Workspace(NamedTuple):
    """What one thread encodes with: addresses for the kernels, and the arrays that they point into."""

    encoder: bpe_kernels.Encoder
    arrays: tuple[npt.NDArray[Any], ...]


def warm_up() -> None:
    """Compile the kernels of encoding, or find them compiled. For a driver to call before its workers start."""
    tokens = [bytes([byte]) for byte in range(256)]
    Tokenizer([*tokens, b"ab"], [(97, 98)], {}).encode("ab " + 200 * "a" + " " + 300 * "b")


class TextBuffer(NamedTuple):
    """Documents one behind the other: document i is bytes offsets[i]:offsets[i + 1] of the memory at address."""

    address: int
    offsets: npt.NDArray[np.int64]
    owner: Any  # keeps the memory alive


def text_buffers(texts: Texts) -> Iterator[TextBuffer]:
    """The memory of texts, Arrow chunk by Arrow chunk; UserError on nulls and on anything that is not text."""
    array = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else _arrow_texts(texts)
    if array.null_count:
        first = next(row for row, is_valid in enumerate(array.is_valid()) if not is_valid.as_py())
        raise UserError(
            f"{array.null_count} of {len(array)} texts are null, the first in row {first}; drop or fill them before"
        )
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        yield _arrow_buffer(chunk)


def _arrow_texts(texts: Sequence[str]) -> pa.Array:
    if isinstance(texts, str):
        raise UserError("one str was given where a list of texts is needed; put it into a list")
    texts = list(texts)
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # a lone surrogate in one of them
        return pa.array([None if text is None else _utf8(text) for text in texts], pa.large_binary())
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"the texts are not all str ({error}); give a list of str or an Arrow string array") from error


def _arrow_buffer(array: pa.Array) -> TextBuffer:
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_string(array.type):
        width: Any = np.int32
    elif pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
        width = np.int64
    else:
        raise UserError(f"the texts are an Arrow array of {array.type}; give one of string or large_string")
    _, offsets_buffer, data = array.buffers()
    if offsets_buffer is None or len(array) == 0:
        return TextBuffer(0, np.zeros(1, np.int64), array)
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(memoryview(offsets_buffer), width)[window].astype(np.int64)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > (data.size if data else 0):
        raise UserError("the Arrow array of texts is corrupt, its offsets leave its data; write the file again")
    return TextBuffer(data.address if data else 0, offsets, array)


def _bytes_buffer(data: bytes) -> TextBuffer:
    array = np.frombuffer(data, np.uint8)
    return TextBuffer(array.ctypes.data, np.array([0, array.size], np.int64), array)


def _utf8(text: str) -> bytes:
    """UTF-8 of a str; surrogates are joined where they are pairs and replaced by U+FFFD where not, as tiktoken does."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def _check(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids of the 256 bytes, and the id that every merge makes; ValueError where the parts do not fit together."""
    tokens, merges, special_tokens = vocabulary
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"has {len(tokens)} tokens, more than {MAX_TOKENS}")
    special_ids = set(special_tokens.values())
    ids = {token: token_id for token_id, token in enumerate(tokens) if token_id not in special_ids}
    if len(ids) + len(special_ids) != len(tokens) or len(special_ids) != len(special_tokens):
        raise ValueError("gives the same bytes two ids, or two special tokens the same id")
    for name, token_id in special_tokens.items():
        if not 0 <= token_id < len(tokens) or tokens[token_id] != name.encode() or not name or name.encode() in ids:
            raise ValueError(f"has the special token {name!r} that is empty, an ordinary token too, or not at its id")
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(f"has no token for the byte {missing[0]}")
    merged_ids = []
    for left, right in merges:
        merged = ids.get(tokens[left] + tokens[right])
        if merged is None or left in special_ids or right in special_ids:
            raise ValueError(
                f"merges {tokens[left]!r} and {tokens[right]!r} to something that is not in its vocabulary"
            )
        merged_ids.append(merged)
    if len(set(merges)) != len(merges):
        raise ValueError("lists a merge twice")
    return [ids[bytes([byte])] for byte in range(256)], merged_ids
