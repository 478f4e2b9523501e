"""The files of token ids between tokenization and training: shard, manifest, memory-mapped reader.

A shard is the ``.bin`` of llm.c and modded-nanogpt: 256 little-endian int32 (magic 20240520, version 1, number of
tokens, zeros), then the tokens as uint16. Vocabularies of more than 65,536 ids take magic 20240801, version 7, uint32.
``manifest.json`` names the shards of a folder; it is written last, so a folder that has one is complete. Every file
appears whole or not at all: it is written under a temporary name, flushed to the disk, then renamed.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

Tokens: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

MANIFEST_NAME = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
SPLITS = ("train", "val")

HEADER_BYTES = 256 * 4
_MAGIC_OF_DTYPE: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype(np.uint16): (20240520, 1),
    np.dtype(np.uint32): (20240801, 7),
}
_DTYPE_OF_MAGIC = {magic: dtype for dtype, magic in _MAGIC_OF_DTYPE.items()}
_MAX_TOKENS = 2**31 - 1  # the header counts in int32
_MANIFEST_FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id below ``vocab_size`` fits, else uint32."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write ``parts`` to ``path``, whole or not at all, and return the sha256 of what was written (hexadecimal).

    A full disk is a UserError and leaves nothing behind; a killed process leaves a ``.tmp-`` file at most.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_shard(path: Path, tokens: npt.NDArray[Any], *, vocab_size: int) -> str:
    """Write a shard of ``tokens`` (1-D, unsigned ids below ``vocab_size``) and return its sha256 (hexadecimal)."""
    if not 0 < len(tokens) <= _MAX_TOKENS:
        raise ValueError(f"a shard holds 1 to {_MAX_TOKENS:,} tokens, not {len(tokens):,}")
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocab_size:,}")
    dtype = token_dtype(vocab_size)
    header = np.zeros(256, dtype="<i4")
    header[:3] = (*_MAGIC_OF_DTYPE[dtype], len(tokens))
    body = np.ascontiguousarray(tokens, dtype=dtype.newbyteorder("<"))
    return write_atomically(path, [header.tobytes(), body.data.cast("B")])


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
    dtype, num_tokens = _parse_header(path, header, size_bytes)
    return np.memmap(path, dtype=dtype.newbyteorder("<"), mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def _parse_header(path: Path, header: npt.NDArray[np.uint8], size_bytes: int) -> tuple[np.dtype[Any], int]:
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


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    """File name in the manifest's folder."""
    split: str
    """train or val."""
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    sha256: str
    """Of the whole file, hexadecimal."""
    source: str
    """The input that it was made from."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds. Its bytes depend on input, tokenizer and settings alone."""

    tokenizer_fingerprint: str
    vocab_size: int
    """Ids are below it."""
    eot_id: int
    """The token that every document starts with."""
    settings: dict[str, Any]
    """What the shards depend on besides input and tokenizer."""
    inputs: tuple[dict[str, Any], ...]
    """Name and identity of everything that was read."""
    shards: tuple[ShardEntry, ...]
    """In reading order: train and val shards of work item 0, then of item 1, ...."""
    skipped: dict[str, int]
    """Reason -> documents that were left out."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``; raises UserError where it is absent or damaged."""
        path = folder / MANIFEST_NAME
        try:
            values = json.loads(path.read_bytes())
            if values.pop("format") != _MANIFEST_FORMAT:
                raise UserError(f"{path} was written by another version of this project; tokenize again")
            values.pop("totals")
            shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
            return cls(**{**values, "inputs": tuple(values["inputs"])}, shards=shards)
        except (FileNotFoundError, NotADirectoryError):
            reason = "is not finished: it has no manifest.json" if folder.is_dir() else "does not exist"
            raise UserError(f"data folder {folder} {reason}; run jobs/tokenize.py with --output {folder}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run jobs/tokenize.py again") from error

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json``, whole or not at all."""
        write_atomically(folder / MANIFEST_NAME, [self.to_bytes()])

    def to_bytes(self) -> bytes:
        """The file's content: the same bytes for the same manifest."""
        names = ("tokens", "documents", "text_bytes")
        totals = {split: {name: self._total(split, name) for name in names} for split in SPLITS}
        values = {"format": _MANIFEST_FORMAT, "totals": totals, **dataclasses.asdict(self)}
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        """sha256 of the file's content, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def tokens(self, split: str) -> int:
        """Tokens of ``split`` ("train" or "val")."""
        return self._total(split, "tokens")

    def documents(self, split: str) -> int:
        """Documents of ``split``."""
        return self._total(split, "documents")

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of ``split``."""
        return self._total(split, "text_bytes")

    def _total(self, split: str, name: str) -> int:
        return sum(getattr(entry, name) for entry in self.shards if entry.split == split)


class TokenStream:
    """Shards end to end, as one read-only sequence of token ids."""

    def __init__(self, shards: Sequence[Tokens], *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._shards = shards
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Tokens:
        """Tokens ``[start, start + length)`` in a new array (uint16, or uint32 above 65,536 ids)."""
        stop = start + length
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start:,}, {stop:,}) lie outside a stream of {len(self):,}")
        tokens: Tokens = np.empty(length, dtype=self.dtype)
        position = start
        index = bisect.bisect_right(self._ends, start)
        while position < stop:
            shard, shard_end = self._shards[index], self._ends[index]
            shard_start = shard_end - len(shard)
            piece_end = min(stop, shard_end)
            tokens[position - start : piece_end - start] = shard[position - shard_start : piece_end - shard_start]
            position, index = piece_end, index + 1
        return tokens


def open_split(folder: Path, split: str) -> TokenStream:
    """The tokens of ``split`` ("train" or "val") in manifest order; cheap, as only the headers are read.

    Raises UserError where a shard is missing, damaged, or not as long as the manifest says. May be of length 0.
    """
    manifest = Manifest.load(folder)
    width = token_dtype(manifest.vocab_size).itemsize
    shards = []
    for entry in manifest.shards:
        if entry.split != split:
            continue
        shard = open_shard(folder / entry.name)
        if len(shard) != entry.tokens or shard.dtype.itemsize != width:
            raise UserError(
                f"shard {folder / entry.name} holds {len(shard):,} tokens of {shard.dtype.itemsize} bytes, but the "
                f"manifest says {entry.tokens:,} of {width}; run jobs/tokenize.py again"
            )
        shards.append(shard)
    return TokenStream(shards, vocab_size=manifest.vocab_size)


def open_files(paths: Sequence[Path], *, vocab_size: int, headerless: bool = False) -> TokenStream:
    """The tokens of ``paths`` in that order, with no manifest: llm.c's shards or, ``headerless``, nanoGPT's."""
    shards = [open_shard(path, headerless=headerless) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.dtype.itemsize > token_dtype(vocab_size).itemsize:
            raise UserError(f"shard {path} holds uint32 tokens, too wide for a vocabulary of {vocab_size:,}")
    return TokenStream(shards, vocab_size=vocab_size)


def verify(folder: Path) -> None:
    """Read every shard and compare it with its sha256 in the manifest; raises UserError for the first that differs."""
    for entry in Manifest.load(folder).shards:
        open_shard(folder / entry.name)
        with (folder / entry.name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            raise UserError(
                f"shard {folder / entry.name} is damaged: its sha256 is {found[:16]}..., the manifest says "
                f"{entry.sha256[:16]}...; delete the folder and run jobs/tokenize.py again"
            )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> UserError:
    """What to tell the user when ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {path.parent} is full: {path.name} could not be written; "
            "make room, then run the same command again"
        )
    return UserError(f"{path} cannot be written: {error.strerror or error}")
