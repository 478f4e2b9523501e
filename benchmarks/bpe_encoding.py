"""Speed of encoding: fresh text after other text, two threads, text that is not English prose."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bpe_peers as peers
from benchmarks.bpe_report import Row, Section, Spread, Target, measure, quotients
from benchmarks.bpe_texts import FOR_THE_RECORD
from pipeline.tokenizer.bpe import Tokenizer

LIMITS = {peers.GIGATOKEN_LIST: 1.0, peers.TIKTOKEN: 4.0}  # on other text
PROBE_BYTES = 1 << 26
IDLE_SPEED_UP = 1.85  # two cores of which each does other work for 7 % of the time


@dataclass(kw_only=True)
class Speeds:
    """MB/s of one contender."""

    cold: float = 0.0
    """First part, from an empty cache."""
    fresh: list[float] = field(default_factory=list)
    """First passes over the later parts."""
    fresh_wall: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    """Second passes, each right after the first."""


def race(tokenizer: Tokenizer, parts: Sequence[Any], names: Sequence[str], sample_bytes: float) -> dict[str, Speeds]:
    """Every contender on every part, side by side, the first to start changing from part to part."""
    speeds = {name: Speeds() for name in names}
    reference = copy.copy(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        racers = peers.contenders(tokenizer, Path(folder), names)
        for number, part in enumerate(parts):
            expected = reference.encode_batch(part)
            sample = peers.first_documents(part, sample_bytes)
            first = number % len(racers)
            for racer in racers[first:] + racers[:first]:
                texts = sample if racer.is_slow else part
                _run(racer, texts, expected, speeds[racer.name], is_cold=number == 0)
    return speeds


def _run(racer: peers.Contender, texts: Any, expected: peers.Encoded, speeds: Speeds, *, is_cold: bool) -> None:
    """The first pass of a contender over a part, and a second where it keeps a cache."""
    megabytes = peers.num_bytes(texts) / 1e6
    prepared = racer.prepare(texts)
    seconds, result = measure(lambda: racer.encode(prepared))
    peers.require_equal(racer.name, expected, racer.ids(result), texts)
    del result
    if is_cold:
        speeds.cold = megabytes / seconds.cpu
        return
    speeds.fresh.append(megabytes / seconds.cpu)
    speeds.fresh_wall.append(megabytes / seconds.wall)
    if not racer.is_slow:
        speeds.again.append(megabytes / measure(lambda: racer.encode(prepared))[0].cpu)


def encode(tokenizer: Tokenizer, parts: Sequence[Any], sample_bytes: float) -> Section:
    """Part 0 warms all up, then come the others, each fresh when it comes."""
    ours = (peers.OURS_LIST, peers.OURS_ARROW)
    fast = (peers.GIGATOKEN_LIST, peers.GIGATOKEN_POOL, peers.GIGATOKEN_BUFFERS, peers.GIGATOKEN_FILES)
    slow = (peers.TIKTOKEN, peers.TOKENIZERS)
    speeds = race(tokenizer, parts, (*ours, *fast, *slow), sample_bytes)
    section = Section(title=f"1. Encode, one core, {len(parts) - 1} fresh parts after a warm-up on another")
    section.tables.append(("MB per CPU-second", [_speed_row(name, one) for name, one in speeds.items()]))
    section.tables.append(
        (
            "ratios on fresh text, part by part",
            [
                {"peer": name, **{f"{our} / peer": quotients(speeds[our].fresh, speeds[name].fresh) for our in ours}}
                for name in (*fast, *slow)
            ],
        )
    )
    section.notes.append(
        f"Slower peers encode the first {sample_bytes / 1e6:.0f} MB of each part. All ids are equal to ours. "
        "Buffers and Arrow: UTF-8 in place, no str; the other jobs begin with str objects."
    )
    for peer, limit in ((peers.GIGATOKEN_LIST, 1.2), (peers.GIGATOKEN_POOL, 1.2), (peers.TIKTOKEN, 25)):
        for our in ours:
            ratio = quotients(speeds[our].fresh, speeds[peer].fresh).median
            section.targets.append(Target(name=f"{our} / {peer}", found=ratio, limit=limit))
    return section


def _speed_row(name: str, speeds: Speeds) -> dict[str, Any]:
    return {
        "": name,
        "cold": speeds.cold,
        "fresh": Spread.of(speeds.fresh),
        "fresh, wall": Spread.of(speeds.fresh_wall),
        "again": Spread.of(speeds.again) if speeds.again else None,
    }


def texts(tokenizer: Tokenizer, named_texts: Iterable[tuple[str, Any]], num_parts: int, sample_bytes: float) -> Section:
    """The race of section 1 on every text, cut into num_parts parts of which the first warms up."""
    names = (peers.OURS_LIST, peers.OURS_ARROW, peers.GIGATOKEN_LIST, peers.GIGATOKEN_BUFFERS, peers.TIKTOKEN)
    section = Section(title=f"4. Other text, one core, {num_parts - 1} fresh parts after a warm-up on another")
    speed_rows: list[Row] = []
    cold_rows: list[Row] = []
    ratio_rows: list[Row] = []
    for text_name, documents in named_texts:
        speeds = race(tokenizer, _cut(documents, num_parts), names, sample_bytes)
        megabytes = peers.num_bytes(documents) / 1e6
        row: dict[str, Any] = {"": text_name, "MB": megabytes, "bytes per document": megabytes * 1e6 / len(documents)}
        speed_rows.append(row | {name: Spread.of(one.fresh) for name, one in speeds.items()})
        cold_rows.append({"": text_name} | {name: one.cold for name, one in speeds.items()})
        ratio_rows.append(_ratio_row(text_name, speeds))
        for peer, limit in LIMITS.items():
            if peer == peers.GIGATOKEN_LIST and text_name in FOR_THE_RECORD:
                continue
            ratio = quotients(speeds[peers.OURS_LIST].fresh, speeds[peer].fresh).median
            section.targets.append(Target(name=f"{text_name}: ours / {peer}", found=ratio, limit=limit))
    section.tables.append(("fresh, MB per CPU-second", speed_rows))
    section.tables.append(("ratios, ours / peer, part by part", ratio_rows))
    section.tables.append(("first part, from empty caches, MB per CPU-second", cold_rows))
    section.notes.append(f"For the record: {', '.join(FOR_THE_RECORD)}. tiktoken encodes a sample of each part.")
    return section


def _ratio_row(text_name: str, speeds: dict[str, Speeds]) -> dict[str, Any]:
    from_list, from_arrow = speeds[peers.OURS_LIST], speeds[peers.OURS_ARROW]
    theirs, buffers = speeds[peers.GIGATOKEN_LIST], speeds[peers.GIGATOKEN_BUFFERS]
    return {
        "": text_name,
        "gigatoken, list[str]": quotients(from_list.fresh, theirs.fresh),
        "gigatoken, buffers": quotients(from_arrow.fresh, buffers.fresh),
        "again, list[str]": quotients(from_list.again, theirs.again),
        "again, buffers": quotients(from_arrow.again, buffers.again),
        "best of all, list[str]": max(from_list.again + from_list.fresh) / max(theirs.again + theirs.fresh),
        "tiktoken": quotients(from_list.fresh, speeds[peers.TIKTOKEN].fresh),
    }


def _cut(documents: Any, num_parts: int) -> list[Any]:
    """Parts of equally many documents."""
    bounds = [len(documents) * i // num_parts for i in range(num_parts + 1)]
    return [documents.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]


# --- two threads


def threads(tokenizer: Tokenizer, parts: Sequence[Any], cores: set[int]) -> Section:
    """One thread and two, side by side on fresh text and again on the same, by the clock; needs two cores."""
    if len(cores) < 2:
        return Section(title="2. Two threads", notes=["Not measured: this process may use one core only."])
    section = Section(title="2. Two threads against one, by the clock")
    modes = _thread_modes(tokenizer)
    fresh: dict[str, list[float]] = {name: [] for name in modes}
    again: dict[str, list[float]] = {name: [] for name in modes}
    probes = []
    reference = copy.copy(tokenizer)
    for number, part in enumerate(parts):
        megabytes, expected = peers.num_bytes(part) / 1e6, reference.encode_batch(part)
        probes.append(probe())
        order = list(modes)[number % len(modes) :] + list(modes)[: number % len(modes)]
        for name in order:
            seconds, found = measure(functools.partial(modes[name], part))
            peers.require_equal(name, expected, found, part)
            repeated, _ = measure(functools.partial(modes[name], part))
            if number:  # part 0 warms up
                fresh[name].append(megabytes / seconds.wall)
                again[name].append(megabytes / repeated.wall)
    single = next(iter(modes))
    rows: list[Row] = [
        {
            "": name,
            "fresh MB/s": Spread.of(fresh[name]),
            "again MB/s": Spread.of(again[name]),
            "fresh / one thread": quotients(fresh[name], fresh[single]),
            "again / one thread": quotients(again[name], again[single]),
        }
        for name in modes
    ]
    section.tables.append(("MB per second", rows))
    idle = Spread.of(probes)
    loads = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    section.notes.append(f"Load of the machine {loads}. Hashing in two threads against one: {idle} x.")
    if idle.median < IDLE_SPEED_UP:
        section.notes.append("The cores were not idle: the target cannot be judged here.")
    best = max(quotients(again[name], again[single]).median for name in modes if name != single)
    section.targets.append(Target(name="two threads / one, again", found=best, limit=1.7))
    best = max(quotients(fresh[name], fresh[single]).median for name in modes if name != single)
    section.targets.append(Target(name="two threads / one, fresh", found=best, limit=1.7))
    return section


def _thread_modes(tokenizer: Tokenizer) -> dict[str, Callable[[Any], peers.Encoded]]:
    """Ways to encode a part, each with a tokenizer of its own; the first is one thread."""
    own = [copy.copy(tokenizer) for _ in range(3)]

    def halves(texts: Any) -> peers.Encoded:
        half = peers.first_documents(texts, peers.num_bytes(texts) / 2)
        rest = texts.slice(len(half))
        with ThreadPoolExecutor(1) as executor:
            later = executor.submit(_encode, own[1], rest)
            ids, offsets = _encode(own[1], half)
            more_ids, more_offsets = later.result()
        return np.concatenate([ids, more_ids]), np.concatenate([offsets, offsets[-1] + more_offsets[1:]])

    modes: dict[str, Callable[[Any], peers.Encoded]] = {
        "one thread": lambda texts: _encode(own[0], texts),
        "two Python threads, half of the text each": halves,
    }
    if "num_threads" in inspect.signature(own[2].encode_batch).parameters:
        modes["num_threads=2"] = lambda texts: _encode(own[2], texts, num_threads=2)
    return modes


def _encode(tokenizer: Tokenizer, texts: Any, **options: Any) -> peers.Encoded:
    encode: Callable[..., peers.Encoded] = getattr(tokenizer, "encode_arrow", tokenizer.encode_batch)
    return encode(texts, **options)


def probe() -> float:
    """How much faster two threads hash than one: 2 where two cores are idle, 1 where there is one core for both."""
    data = bytes(PROBE_BYTES)

    def hash_data() -> float:
        hashlib.sha256(data).digest()  # without the GIL, and in a core's own cache
        return time.perf_counter()

    with ThreadPoolExecutor(2) as executor:
        executor.submit(hash_data).result()
        start = time.perf_counter()
        alone = executor.submit(hash_data).result() - start
        start = time.perf_counter()
        both = max(future.result() for future in [executor.submit(hash_data) for _ in range(2)]) - start
    return 2 * alone / both
