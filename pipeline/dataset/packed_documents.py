"""--packing best_fit: the documents of a split packed into windows, none cut that fits into one.

A document longer than a window gives whole windows from its beginning on; the rest of it, and every shorter document,
are packed best-fit decreasing (Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830), some tens
of thousands of documents at a time. A rest, which no <|endoftext|> sets apart from what is before it, stands at the
head of its window; so no window has two. What is left behind the last document is filled up with the beginning of
another one, which is read as a whole elsewhere: no token is left out, every target counts, and the tokens that are read
twice are counted.

The plan is a function of the tokens and the length of a window alone. It is made once by every node, which reads all
tokens for it, and kept in the node's cache; a window is one look into it.

Shapes: D documents, P pieces of windows, W windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.best_fit import pack
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import Tokens, TokenStream, open_split
from pipeline.storage.folders import Folder, LocalFolder, node_cache
from pipeline.storage.json_files import DamagedFileError, read_json, write_json
from pipeline.storage.locks import process_lock

logger = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]

_VERSION = 1  # of the way documents are packed; another one would give a run that goes on other windows
_DOCUMENTS_AT_ONCE = 1 << 16
_TOKENS_AT_ONCE = 1 << 23
_SUMMARY = "plan.json"
_ARRAYS: dict[str, np.dtype[Any]] = {"starts": np.dtype("<i8"), "lengths": np.dtype("<i4"), "firsts": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tokens of a stream the windows have."""

    starts: Numbers
    """(P,) Where each piece begins in the stream; the pieces of a window follow one another."""
    lengths: npt.NDArray[np.int32]
    """(P,) Tokens of each piece; those of a window sum up to L."""
    firsts: Numbers
    """(W + 1,) The first piece of each window, and P."""
    num_documents: int
    num_cut: int
    """Documents that are cut because they are longer than a window."""
    num_repeated: int
    """Tokens that fill windows up; they are read elsewhere too."""

    @property
    def num_windows(self) -> int:
        return len(self.firsts) - 1

    def sentence(self) -> str:
        """What it does to the documents, for people."""
        share = self.num_repeated / int(self.lengths.sum(dtype=np.int64))
        return (
            f"best-fit packing: {self.num_documents:,} documents in {self.num_windows:,} windows, {self.num_cut:,} of "
            f"them cut because they are longer than one; {share:.3%} of the tokens are beginnings of documents that "
            "fill windows up, read twice; none is cropped"
        )


class PackedDocuments(TokenStream):
    """The windows of a plan end to end: window w is tokens [w L, (w + 1) L), as in a stream that is cut."""

    def __init__(self, stream: TokenStream, plan: Plan, *, window_length: int) -> None:
        self.vocab_size, self.dtype, self.files = stream.vocab_size, stream.dtype, stream.files
        self.plan = plan
        self._stream, self._length = stream, window_length

    def __len__(self) -> int:
        return self.plan.num_windows * self._length

    def notes(self) -> list[str]:
        return [self.plan.sentence()]

    def read(self, start: int, length: int) -> Tokens:
        """Tokens ``[start, start + length)``, which must lie in one window, in a new array."""
        window, offset = divmod(start, self._length)
        if not (0 <= window < self.plan.num_windows and offset + length <= self._length):
            raise IndexError(f"tokens [{start:,}, {start + length:,}) do not lie in one window of {self._length:,}")
        pieces = zip(*self._pieces(window), strict=True)
        parts: list[npt.NDArray[Any]] = [self._stream.read(int(first), int(size)) for first, size in pieces]
        tokens: Tokens = np.concatenate(parts)[offset : offset + length]
        return tokens

    def shard_at(self, position: int) -> tuple[str, int]:
        """The shard that holds the token at ``position``, and the token's index in it."""
        window, offset = divmod(position, self._length)
        starts, lengths = self._pieces(window)
        ends = np.cumsum(lengths)
        piece = int(np.searchsorted(ends, offset, side="right"))
        return self._stream.shard_at(int(starts[piece] + offset - (ends[piece] - lengths[piece])))

    def _pieces(self, window: int) -> tuple[Numbers, npt.NDArray[np.int32]]:
        pieces = slice(*self.plan.firsts[window : window + 2].tolist())
        return self.plan.starts[pieces], self.plan.lengths[pieces]


def packed_stream(manifest: Manifest, stream: TokenStream, *, window_length: int) -> PackedDocuments:
    """The training stream of a manifest, at least ``window_length`` tokens, in packed windows."""
    return PackedDocuments(
        stream, open_plan(manifest, stream, window_length=window_length), window_length=window_length
    )


def describe_packing(folder: Folder, *, window_length: int) -> str:
    """What packing does to the documents of a folder, for people; what is in a bucket is not fetched for it."""
    if not isinstance(folder, LocalFolder):
        return f"the documents of {folder} are counted when the run starts, from a copy on its nodes"
    manifest = Manifest.load(folder)
    if manifest.tokens("train") < window_length:
        return f"{folder} has fewer tokens to train on than one window"
    return open_plan(manifest, open_split(folder, "train"), window_length=window_length).sentence()


def open_plan(manifest: Manifest, stream: TokenStream, *, window_length: int) -> Plan:
    """The plan of a manifest's training stream, from this node's cache, or made and put there; others wait for it."""
    folder = LocalFolder(url=str(node_cache(f"packing-{manifest.fingerprint[:20]}-{window_length}-{_VERSION}")))
    with process_lock(folder.path / ".lock"):
        if (known := _read(folder)) is not None:
            return known
        began = time.monotonic()
        plan = make_plan(document_starts(stream, manifest.eot_id), len(stream), window_length)
        logger.info("documents packed in %.1f s; the plan is kept in %s", time.monotonic() - began, folder)
        _write(folder, plan)
    return plan


def document_starts(stream: TokenStream, document_token: int) -> Numbers:
    """(D,) Where documents begin; tokens before the first of them are the end of one that began elsewhere."""
    found = []
    for first in range(0, len(stream), _TOKENS_AT_ONCE):
        tokens = stream.read(first, min(_TOKENS_AT_ONCE, len(stream) - first))
        found.append(np.flatnonzero(tokens == document_token).astype(np.int64) + first)
    return np.concatenate(found)


def make_plan(starts: Numbers, num_tokens: int, window_length: int) -> Plan:
    """The plan for documents that begin at ``starts`` (D,), which rise, in a stream of ``num_tokens``, at least L."""
    is_headless = len(starts) == 0 or starts[0] > 0
    begins = np.concatenate([[0], starts]) if is_headless else starts
    lengths = np.diff(np.append(begins, num_tokens))
    is_rest = lengths > window_length
    is_rest[0] |= is_headless
    groups = [
        _pack_group(begins[group], lengths[group], is_rest[group], window_length)
        for group in (slice(first, first + _DOCUMENTS_AT_ONCE) for first in range(0, len(begins), _DOCUMENTS_AT_ONCE))
    ]
    piece_starts, piece_lengths, counts = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    ends = np.cumsum(counts)
    gaps = window_length - np.add.reduceat(piece_lengths, ends - counts)
    has_gap = gaps > 0
    last = piece_starts[ends[has_gap] - 1]
    fillings = _beginnings_behind(last, gaps[has_gap], starts, num_tokens)
    return Plan(
        starts=np.insert(piece_starts, ends[has_gap], fillings),
        lengths=np.insert(piece_lengths, ends[has_gap], gaps[has_gap]).astype(np.int32),
        firsts=np.concatenate([[0], np.cumsum(counts + has_gap)]),
        num_documents=len(begins),
        num_cut=int((lengths > window_length).sum()),
        num_repeated=int(gaps.sum()),
    )


def _pack_group(
    begins: Numbers, lengths: Numbers, is_rest: npt.NDArray[np.bool_], window_length: int
) -> tuple[Numbers, Numbers, Numbers]:
    """Starts and lengths of the pieces of a group's windows, (P,) each, and the number of pieces of each, (W,)."""
    whole, left = np.divmod(lengths, window_length)
    place = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    full = np.repeat(begins, whole) + place * window_length
    chosen = np.flatnonzero(left)
    windows = pack(left[chosen].tolist(), window_length, is_rest[chosen].tolist())
    order = chosen[np.fromiter(itertools.chain.from_iterable(windows), dtype=np.int64)]
    starts = np.concatenate([full, begins[order] + whole[order] * window_length])
    sizes = np.concatenate([np.full(len(full), window_length), left[order]])
    counts = np.concatenate([np.ones(len(full), dtype=np.int64), np.array([len(each) for each in windows], np.int64)])
    return starts, sizes, counts


def _beginnings_behind(places: Numbers, sizes: Numbers, starts: Numbers, num_tokens: int) -> Numbers:
    """Where the document behind each of ``places`` begins, or the first where that has too few tokens behind it."""
    first = starts[0] if len(starts) else 0
    following = np.append(starts, first)[np.searchsorted(starts, places, side="right")]
    following = np.where(following + sizes <= num_tokens, following, first)
    return np.minimum(following, num_tokens - sizes)


# ---- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """plan.json, which is written last."""

    num_documents: int
    num_cut: int
    num_repeated: int
    sha256: dict[str, str]
    """Of the file of each array."""


def _write(folder: LocalFolder, plan: Plan) -> None:
    hashes = {}
    for name, dtype in _ARRAYS.items():
        array = np.ascontiguousarray(getattr(plan, name), dtype=dtype)
        hashes[name] = folder.write(f"{name}.bin", [array.data.cast("B")])
    summary = _Summary(
        num_documents=plan.num_documents, num_cut=plan.num_cut, num_repeated=plan.num_repeated, sha256=hashes
    )
    write_json(folder, _SUMMARY, asdict(summary))


def _read(folder: LocalFolder) -> Plan | None:
    """The plan that is there, its arrays mapped; None where there is none, or a damaged one."""
    try:
        found = read_json(folder, _SUMMARY, _Summary, mend="the documents are packed again")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None
    if found is None:
        return None
    files = {name: folder.path / f"{name}.bin" for name in _ARRAYS}
    if any(_sha256(file) != found.sha256.get(name) for name, file in files.items()):
        logger.warning("the plan in %s is damaged; the documents are packed again", folder)
        return None
    arrays: dict[str, Any] = {name: np.memmap(file, dtype=_ARRAYS[name], mode="r") for name, file in files.items()}
    return Plan(**arrays, num_documents=found.num_documents, num_cut=found.num_cut, num_repeated=found.num_repeated)


def _sha256(file: Path) -> str | None:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None
