"""Speed of training against rustbpe, `tokenizers` and gigatoken, one thread each, compilation excluded."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import rustbpe
import tokenizers
from gigatoken.gigatoken_rs import train_bpe as gigatoken_train

from benchmarks import bpe_peers as peers
from benchmarks.bpe_pipeline import compile_seconds
from benchmarks.bpe_report import Row, Seconds, Section, Spread, Target, measure, quotients
from pipeline.tokenizer.bpe import END_OF_TEXT
from pipeline.tokenizer.patterns import PATTERNS
from pipeline.tokenizer.training import count_pretokens, train_bpe, warm_up

LIST, ARROW = "ours, list[str]", "ours, Arrow"
RUSTBPE, TOKENIZERS, GIGATOKEN = "rustbpe", "tokenizers", "gigatoken"
LIMITS = {RUSTBPE: 8.0, TOKENIZERS: 20.0}

Merges = list[bytes]
"""What the merges made, first learned first."""


def training(parts: Sequence[Any], sizes: tuple[int, int], repeats: int, peer_repeats: int) -> Section:
    """The first size on one part, the second on all of them."""
    section = Section(title="5. Training, one core")
    warm_up()
    section.notes.append(
        f"Not counted: compiling on the first call of a machine, {compile_seconds():.1f} s in a new process. "
        f"Ours {repeats} times, peers {peer_repeats}; a ratio is the median of the peer over each of ours. Merges: how "
        "many of the first are equal to ours, and how many of ours the peer has at all; ties go by another rule there."
    )
    for size, chosen in ((sizes[0], parts[:1]), (sizes[1], parts)):
        texts = pa.chunked_array(list(itertools.chain.from_iterable(part.chunks for part in chosen)))
        _train(section, texts, size, repeats, peer_repeats)
    return section


def _train(section: Section, texts: Any, size: int, repeats: int, peer_repeats: int) -> None:
    """One size on one text, all trainers; adds a table and the targets."""
    seconds: dict[str, list[Seconds]] = {}
    merges: dict[str, Merges] = {}
    counting: list[float] = []
    for repeat in range(max(repeats, peer_repeats)):
        for name, (prepare, train) in _trainers(size).items():
            if repeat >= (repeats if name in (LIST, ARROW) else peer_repeats):
                continue
            prepared = prepare(texts)
            took, list_merges = measure(functools.partial(train, prepared))
            merges[name] = list_merges()
            seconds.setdefault(name, []).append(took)
        if repeat < repeats:
            counting.append(measure(lambda: count_pretokens(texts))[0].cpu)
    rows: list[Row] = []
    for name, repeated in seconds.items():
        rows.append(
            {
                "": name,
                "CPU s": Spread.of(one.cpu for one in repeated),
                "wall s": Spread.of(one.wall for one in repeated),
                **_ratios(name, seconds),
                "equal first": _equal_first(merges[name], merges[ARROW]),
                "in common, %": 100 * len(set(merges[name]) & set(merges[ARROW])) / len(merges[ARROW]),
            }
        )
    megabytes = peers.num_bytes(texts) / 1e6
    section.tables.append((f"{size:,} ids on {megabytes:,.1f} MB", rows))
    section.notes.append(f"{size:,} ids: counting is {Spread.of(counting)} CPU s of ours, Arrow.")
    for name, limit in LIMITS.items():
        ratio = _ratios(name, seconds)[f"/ {LIST}"].median
        section.targets.append(
            Target(name=f"{size:,} ids, {megabytes:.0f} MB: {name} / {LIST}", found=ratio, limit=limit)
        )


def _ratios(name: str, seconds: dict[str, list[Seconds]]) -> dict[str, Spread]:
    """CPU seconds of a trainer over ours."""
    theirs = Spread.of(one.cpu for one in seconds[name]).median
    return {
        f"/ {ours}": quotients([theirs] * len(seconds[ours]), [one.cpu for one in seconds[ours]])
        for ours in (LIST, ARROW)
    }


def _trainers(size: int) -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Callable[[], Merges]]]]:
    """name -> (prepare, not timed; train, which returns what lists the merges, not timed either)."""
    return {
        LIST: (peers.to_list, lambda texts: _ours(texts, size)),
        ARROW: (lambda texts: texts, lambda texts: _ours(texts, size)),
        RUSTBPE: (peers.to_list, lambda texts: _rustbpe(texts, size)),
        TOKENIZERS: (peers.to_list, lambda texts: _tokenizers(texts, size)),
        GIGATOKEN: (_joined, lambda data: _gigatoken(data, size)),
    }


def _ours(texts: Any, size: int) -> Callable[[], Merges]:
    tokenizer = train_bpe(texts, size)
    return lambda: [tokenizer.decode_bytes([i]) for i in range(256, tokenizer.vocab_size - 1)]


def _rustbpe(texts: list[str], size: int) -> Callable[[], Merges]:
    peer = rustbpe.Tokenizer()
    peer.train_from_iterator(iter(texts), size - 1, pattern=PATTERNS["gpt2"])  # no special token
    return lambda: [
        token for token, rank in sorted(peer.get_mergeable_ranks(), key=lambda item: item[1]) if rank >= 256
    ]


def _tokenizers(texts: list[str], size: int) -> Callable[[], Merges]:
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    peer.train_from_iterator(texts, trainer)

    def merges() -> Merges:
        byte_of = _byte_of_letter()
        pairs = json.loads(peer.to_str())["model"]["merges"]
        return [bytes(byte_of[letter] for letter in "".join(pair)) for pair in pairs]

    return merges


def _byte_of_letter() -> dict[str, int]:
    """How byte-level files write bytes: the printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _joined(texts: Any) -> bytes:
    return peers.SEPARATOR.join(texts.to_pylist()).encode()


def _gigatoken(data: bytes, size: int) -> Callable[[], Merges]:
    with _silence():
        _, merges = gigatoken_train(data, size, [END_OF_TEXT], separator=peers.SEPARATOR.encode())
    return lambda: [left + right for left, right in merges]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """gigatoken's trainer writes on both streams, past Python."""
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copied in zip((1, 2), kept, strict=True):
            os.dup2(copied, stream)
            os.close(copied)
        os.close(nowhere)


def _equal_first(found: Merges, ours: Merges) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(found, ours, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(found), len(ours)))
