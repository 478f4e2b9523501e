"""The files of token ids between tokenization and training: shards and their memory-mapped reader.

A shard is the ``.bin`` of llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520, version 1, number of
tokens, zeros), then the tokens as uint16. Vocabularies of more than 65,536 ids take magic 20240801, version 7, uint32.
The manifest names the shards of a folder and their order (manifest.py). Shards of a bucket are read from a copy on the
node (storage/node_copy.py).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.dataset.manifest import FLAGS, Manifest, ShardEntry
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, as_folder, in_threads, node_cache
from pipeline.storage.locks import process_lock
from pipeline.storage.node_copy import FileEntry, Finding, WrongFileError, fetch

Tokens: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

HEADER_BYTES = 256 * 4
_MAGIC_OF_DTYPE: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype(np.uint16): (20240520, 1),
    np.dtype(np.uint32): (20240801, 7),
}
_DTYPE_OF_MAGIC = {magic: dtype for dtype, magic in _MAGIC_OF_DTYPE.items()}
_MAX_TOKENS = 2**31 - 1  # the header counts in int32

_MOST_MAPS = 4096  # at a time; a process may have some 65,000, and each takes a file descriptor
_STATS_AT_ONCE = 16
_AGAIN = "run jobs/tokenize.py again (or jobs/import_shards.py, if that made the folder)"
MEND = f"put it back, or delete what is left of it and {_AGAIN}, which makes the same bytes"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id below ``vocab_size`` fits, else uint32."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


def shard_bytes(num_tokens: int, vocab_size: int) -> int:
    """Size of a shard's file."""
    return HEADER_BYTES + num_tokens * token_dtype(vocab_size).itemsize


def file_bytes(entry: ShardEntry, vocab_size: int) -> int:
    """Size of the file of a manifest's entry, with its header or without one."""
    return shard_bytes(entry.tokens, vocab_size) - (HEADER_BYTES if entry.headerless else 0)


def shard_parts(tokens: npt.NDArray[Any], *, vocab_size: int) -> list[bytes | memoryview]:
    """The content of a shard of ``tokens`` (1-D, unsigned ids below ``vocab_size``): header and body."""
    if not 0 < len(tokens) <= _MAX_TOKENS:
        raise ValueError(f"a shard holds 1 to {_MAX_TOKENS:,} tokens, not {len(tokens):,}")
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocab_size:,}")
    dtype = token_dtype(vocab_size)
    header = np.zeros(256, dtype="<i4")
    header[:3] = (*_MAGIC_OF_DTYPE[dtype], len(tokens))
    body = np.ascontiguousarray(tokens, dtype=dtype.newbyteorder("<"))
    return [header.tobytes(), body.data.cast("B")]


def open_shard(path: Path, *, headerless: bool = False) -> Tokens:
    """Memory-map the tokens of one shard, read-only; only its header is read.

    ``headerless`` files are bare uint16, as nanoGPT writes them. Raises UserError for what is no whole shard.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="u1")
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing") from None
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    if size_bytes == 0:
        raise UserError(f"shard {path} is empty; write it again")
    if headerless:
        if size_bytes % 2:
            raise UserError(f"{path} has {size_bytes:,} bytes, an odd number, so it does not hold bare uint16 tokens")
        return np.memmap(path, dtype="<u2", mode="r")
    dtype, num_tokens = parse_header(str(path), header, size_bytes)
    return np.memmap(path, dtype=dtype.newbyteorder("<"), mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def has_header(head: bytes) -> bool:
    """Whether a file that begins with these bytes has the header of a shard, whole or cut."""
    return len(head) >= 8 and tuple(np.frombuffer(head[:8], dtype="<i4").tolist()) in _DTYPE_OF_MAGIC


def parse_header(path: str, header: npt.NDArray[np.uint8], size_bytes: int) -> tuple[np.dtype[Any], int]:
    """The dtype and number of tokens that the first bytes of a shard state; UserError where they cannot be right."""
    if size_bytes < HEADER_BYTES:
        raise UserError(f"shard {path} is truncated: {size_bytes:,} bytes are less than its header of {HEADER_BYTES:,}")
    magic, version, num_tokens = (int(value) for value in header.view("<i4")[:3])
    dtype = _DTYPE_OF_MAGIC.get((magic, version))
    if dtype is None:
        known = " or ".join(f"{magic}, {version}" for magic, version in _DTYPE_OF_MAGIC)
        raise UserError(f"{path} is no shard: it begins with the numbers {magic}, {version} in place of {known}")
    expected_bytes = HEADER_BYTES + num_tokens * dtype.itemsize
    if num_tokens <= 0 or size_bytes != expected_bytes:
        raise UserError(
            f"shard {path} is damaged: its header counts {num_tokens:,} tokens, {expected_bytes:,} bytes in all, "
            f"but the file has {size_bytes:,}; write it again"
        )
    return dtype, num_tokens


def other_sha256(found: str, expected: str) -> str:
    """The part of a message that says how two checksums differ."""
    return f"its sha256 is {found[:16]}..., the manifest says {expected[:16]}..."


# ---- reading ---------------------------------------------------------------------------------------------------------


class TokenStream:
    """Shards end to end, as one read-only sequence of token ids; threads may read at the same time."""

    def __init__(self, shards: Sequence[Tokens] | ShardFiles, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._shards = shards
        self.files = shards if isinstance(shards, ShardFiles) else None  # of a manifest, behind the stream
        lengths = [entry.tokens for entry in shards.entries] if isinstance(shards, ShardFiles) else map(len, shards)
        self._ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def file_sets(self) -> list[ShardFiles]:
        """All files of a manifest behind the stream, for checking."""
        return [] if self.files is None else [self.files]

    def notes(self) -> list[str]:
        """What is to be said of how the windows were made; nothing where tokens lie in their order."""
        return []

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the shard that holds the token at ``position``, and the token's index in it."""
        index = bisect.bisect_right(self._ends, position)
        return index, position - (self._ends[index - 1] if index else 0)

    def shard_at(self, position: int) -> tuple[str, int]:
        """The name of the shard that holds the token at ``position``, and the token's index in it."""
        index, offset = self.locate(position)
        return (self.files.entries[index].name if self.files is not None else f"shard {index}"), offset

    def read(self, start: int, length: int) -> Tokens:
        """Tokens ``[start, start + length)`` in a new array (uint16, or uint32 above 65,536 ids).

        Raises:
            UserError: a shard is missing or damaged, or an id is not below the vocabulary's size. The ids are looked at
                here, in every window, because a shard whose sha256 is right may hold them, too.
        """
        stop = start + length
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start:,}, {stop:,}) lie outside a stream of {len(self):,}")
        tokens: Tokens = np.empty(length, dtype=self.dtype)
        position = start
        index = bisect.bisect_right(self._ends, start)
        while position < stop:
            shard, shard_end = self._shards[index], self._ends[index]
            shard_start = shard_end - len(shard)
            end = min(stop, shard_end)
            tokens[position - start : end - start] = shard[position - shard_start : end - shard_start]
            position, index = end, index + 1
        if length and int(tokens.max()) >= self.vocab_size:
            raise self._wrong_id(start, tokens)
        return tokens

    def _wrong_id(self, start: int, tokens: Tokens) -> UserError:
        """The error message for the first id of ``tokens``, read from ``start`` on, that the vocabulary has not."""
        first = int(np.argmax(tokens >= self.vocab_size))
        index, place = self.locate(start + first)
        name = f"{self.files.folder}/{self.files.entries[index].name}" if self.files else f"number {index}"
        return UserError(
            f"shard {name} holds the id {int(tokens[first]):,} at token {place:,}, but ids are below "
            f"{self.vocab_size:,}; {_AGAIN}"
        )


class PackedStream(TokenStream):
    """Windows of packed conversations: their tokens, and as many flags (packed.py) in shards of their own."""

    def __init__(self, shards: Sequence[Tokens] | ShardFiles, flags: TokenStream, *, vocab_size: int) -> None:
        super().__init__(shards, vocab_size=vocab_size)
        if len(flags) != len(self):
            raise UserError(f"the data have {len(self):,} tokens, but flags for {len(flags):,}; {_AGAIN}")
        self.flags = flags

    @property
    def file_sets(self) -> list[ShardFiles]:
        return [*super().file_sets, *self.flags.file_sets]


class ShardFiles:
    """The shards of a folder, each mapped when it is first read; the least recently used are unmapped.

    Raises UserError for a shard that is missing, damaged, or not as long as the manifest says.
    """

    def __init__(self, folder: Path, entries: Sequence[ShardEntry], *, vocab_size: int, max_maps: int) -> None:
        self.folder, self.entries, self._vocab_size = folder, entries, vocab_size
        self._mapped = functools.lru_cache(max_maps)(lambda index: self._open(entries[index]))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tokens:
        return self._mapped(index)  # a map that is dropped is unmapped when no reader holds it any more

    def check_sizes(self) -> None:
        """Check the size of every file; a wrong header is found when the shard is first read."""

        def check(entry: ShardEntry) -> None:
            try:
                size_bytes = (self.folder / entry.name).stat().st_size
            except OSError:
                size_bytes = -1
            if size_bytes != file_bytes(entry, self._vocab_size):
                self._open(entry)

        in_threads(check, self.entries, _STATS_AT_ONCE)

    def _open(self, entry: ShardEntry) -> Tokens:
        if not (self.folder / entry.name).is_file():
            raise UserError(f"shard {self.folder / entry.name} is missing; {MEND}")
        shard = open_shard(self.folder / entry.name, headerless=entry.headerless)
        width = token_dtype(self._vocab_size).itemsize
        if len(shard) != entry.tokens or shard.dtype.itemsize != width:
            raise UserError(
                f"shard {self.folder / entry.name} holds {len(shard):,} tokens of {shard.dtype.itemsize} bytes, but "
                f"the manifest says {entry.tokens:,} of {width}; {_AGAIN}"
            )
        return shard


def open_split(folder: Folder | Path, split: str, *, num_folders: int = 1) -> TokenStream:
    """The tokens of ``split`` ("train" or "val") in manifest order; cheap, since only the sizes of files are read.

    Shards of a bucket are copied to this node first, by one process, while the others wait (storage/node_copy.py). Of
    ``num_folders`` that a process opens each may map its share of the files at a time.
    Of packed conversations it is a PackedStream. Raises UserError where a shard is missing, damaged, or not
    as long as the manifest says. May be of length 0.
    """
    folder = as_folder(folder)
    manifest = Manifest.load(folder)
    shards = _open_shards(folder, manifest, split, num_folders)
    if manifest.chat_template is None:
        return TokenStream(shards, vocab_size=manifest.vocab_size)
    flags = TokenStream(_open_shards(folder, manifest, FLAGS[split], num_folders), vocab_size=manifest.vocab_size)
    return PackedStream(shards, flags, vocab_size=manifest.vocab_size)


def _open_shards(folder: Folder, manifest: Manifest, split: str, num_folders: int) -> ShardFiles:
    entries = [entry for entry in manifest.shards if entry.split == split]
    path = folder.path if isinstance(folder, LocalFolder) else _copy_to_node(folder, manifest, entries)
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    max_maps = max(16, min(_MOST_MAPS, most_files // 4 if most_files > 0 else _MOST_MAPS) // num_folders)
    shards = ShardFiles(path, entries, vocab_size=manifest.vocab_size, max_maps=max_maps)
    shards.check_sizes()
    return shards


def _copy_to_node(folder: Folder, manifest: Manifest, entries: Sequence[ShardEntry]) -> Path:
    """Fetch the shards of a bucket to this node, those that are not there yet; returns the folder of the copies.

    The copies stay: the next run on this node starts at once.
    """
    copy = LocalFolder(url=str(node_cache(f"shards-{manifest.fingerprint[:20]}")))
    copy.make()
    wanted = [
        FileEntry(name=entry.name, num_bytes=file_bytes(entry, manifest.vocab_size), sha256=entry.sha256)
        for entry in entries
    ]
    try:
        with process_lock(copy.path / ".lock"):
            fetch(folder, copy, wanted, what="shards", trust_sizes=True)
    except WrongFileError as error:
        shard, file = f"shard {folder}/{error.file.name}", error.file
        if error.finding == Finding.MISSING:
            raise UserError(f"{shard} is missing; {_AGAIN}") from error
        difference = f"it {error.finding.reason}"
        if file.sha256 and error.sha256:
            difference = other_sha256(error.sha256, file.sha256)
        raise UserError(f"{shard} is damaged: {difference}; delete it and {_AGAIN}") from error
    return copy.path
