"""The tokenizer in its surroundings: the job from parquet to shards, part by part, and what compiling costs.

``corpus`` calls the stages of jobs/tokenize.py one after the other, without Ray, and puts clocks around the functions
inside them. ``compilation`` starts new processes, with an empty folder of compiled kernels and with a filled one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gigatoken
import pyarrow.parquet as pq
from gigatoken.gigatoken_rs import ParquetFileSource

from benchmarks.bpe_report import ROOT, Row, Seconds, Section, Spread, Target, measure
from benchmarks.data_material import make_job
from pipeline.config.data import TokenizeConfig
from pipeline.preprocessing import encode_documents, ray_dataflow, stages
from pipeline.preprocessing.rows import ItemRow
from pipeline.sources import readers
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import LocalFolder
from pipeline.tokenizer.bpe import Tokenizer

DECODING, VALIDATION, BLANKS = "parquet decoding", "UTF-8 validation", "blank filter"
HASH, ENCODING, PREFIX = "split by hash", "encoding", "end-of-text ids"
JOINING, SHARDS, REST = "cast, concatenation", "shard files", "records and the rest"
TO_IDS = (DECODING, VALIDATION, BLANKS, JOINING, ENCODING, PREFIX)


class Stopwatch:
    """Seconds of named functions while they are patched, each without what it calls of the others."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._running = [REST]
        self._since = (time.process_time(), time.perf_counter())

    def switch(self) -> None:
        """Count what has passed for the function that was running."""
        now = (time.process_time(), time.perf_counter())
        label = self._running[-1]
        self.cpu[label] = self.cpu.get(label, 0.0) + now[0] - self._since[0]
        self.wall[label] = self.wall.get(label, 0.0) + now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def running(self, label: str) -> Iterator[None]:
        self.switch()
        self._running.append(label)
        try:
            yield
        finally:
            self.switch()
            self._running.pop()

    def call(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.running(label):
                return function(*arguments, **options)

        return timed

    def iterate(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """For a function that returns an iterator: its steps are timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Iterator[Any]:
            iterator = function(*arguments, **options)
            while True:
                with self.running(label):
                    item = next(iterator, None)
                if item is None:
                    return
                yield item

        return timed

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """The functions of the job timed; one that the job has no more is left out."""
        places: list[tuple[Any, str, str]] = [
            (readers, "_require_utf8", VALIDATION),
            (readers, "_without_blanks", BLANKS),
            (encode_documents, "split_by_hash", HASH),
            (encode_documents, "encode_documents", PREFIX),
            (Tokenizer, "encode_batch", ENCODING),
            (Tokenizer, "encode_arrow", ENCODING),
            (LocalFolder, "write", SHARDS),
        ]
        with contextlib.ExitStack() as stack:
            decoding = self.iterate(DECODING, pq.ParquetFile.iter_batches)
            stack.enter_context(mock.patch.object(pq.ParquetFile, "iter_batches", decoding))
            for owner, name, label in places:
                if function := getattr(owner, name, None):
                    stack.enter_context(mock.patch.object(owner, name, self.call(label, function)))
            self.switch()  # what came before is not the job
            self.cpu.clear()
            self.wall.clear()
            yield
            self.switch()


def corpus(tokenizer: Tokenizer, paths: Sequence[Path], column: str, repeats: int) -> Section:
    """All parts through the job's stages, each repeat from an empty cache; the peer reads and encodes them too."""
    watches: list[Stopwatch] = []
    theirs: list[Seconds] = []
    megabytes = 0.0
    for _ in range(repeats):
        watch, megabytes = _job(tokenizer, paths, column)
        watches.append(watch)
        theirs.append(_peer(tokenizer, paths, column))
    totals = [sum(watch.cpu.values()) for watch in watches]
    labels = [label for label in (*TO_IDS, HASH, SHARDS, REST) if label in watches[0].cpu]
    rows: list[Row] = []

    def add(name: str, cpu: list[float], wall: list[float], share: Spread | None = None) -> None:
        speed = Spread.of(megabytes / max(one, 1e-9) for one in cpu)
        rows.append(
            {"": name, "CPU s": Spread.of(cpu), "wall s": Spread.of(wall), "share, %": share, "MB per CPU-s": speed}
        )

    for label in labels:
        cpu = [watch.cpu[label] for watch in watches]
        share = Spread.of(100 * one / total for one, total in zip(cpu, totals, strict=True))
        add(label, cpu, [watch.wall[label] for watch in watches], share)
    to_ids = [label for label in TO_IDS if label in watches[0].cpu]
    to_ids_cpu = [sum(watch.cpu[label] for label in to_ids) for watch in watches]
    add("parquet to ids", to_ids_cpu, [sum(watch.wall[label] for label in to_ids) for watch in watches])
    add("the whole job", totals, [sum(watch.wall.values()) for watch in watches])
    add("gigatoken, parquet to ids", [one.cpu for one in theirs], [one.wall for one in theirs])
    section = Section(
        title=f"3. {len(paths)} files of parquet, {megabytes:.0f} MB of text, one core, from empty caches"
    )
    section.tables.append((f"median of {repeats}", rows))
    section.notes.append(
        f"Parquet to ids: {', '.join(TO_IDS)}. gigatoken's encode_files decodes and encodes only, and checks nothing."
    )
    for name, cpu in (("parquet to ids, MB/s", to_ids_cpu), ("the whole job, MB/s", totals)):
        section.targets.append(Target(name=name, found=Spread.of(megabytes / one for one in cpu).median, limit=120.0))
    return section


def _job(tokenizer: Tokenizer, paths: Sequence[Path], column: str) -> tuple[Stopwatch, float]:
    """The stages on every work item, into a folder that is thrown away; seconds and MB of text."""
    with tempfile.TemporaryDirectory() as temporary:
        given, file = Path(temporary) / "source", Path(temporary) / "tokenizer.json"
        given.mkdir()
        for path in paths:
            (given / path.name).symlink_to(path.absolute())
        tokenizer.save(file)
        output = str(Path(temporary) / "output")
        items, job = make_job(TokenizeConfig(source=str(given), output=output, text_column=column, tokenizer=str(file)))
        return _timed_job(items, job)


def _timed_job(items: Sequence[WorkItem], job: stages.EncodeJob) -> tuple[Stopwatch, float]:
    """Both stages, with a tokenizer that has loaded its files and has seen no text."""
    stages.get_tokenizer(job.tokenizer).encode("loaded")
    steps: ray_dataflow.Stages = [(stages.encode, {"job": job}), (stages.write, {"job": job})]
    text_bytes = 0
    watch = Stopwatch()
    with watch.patched():
        for item in items:
            with watch.running(JOINING):  # what the stages do besides the functions that are patched
                rows = [ItemRow.from_table(table) for table in ray_dataflow.in_turn(ItemRow.of(item).to_table(), steps)]
            for row in rows:
                if row.error is not None:
                    raise SystemExit(f"error: {row.error}")
                text_bytes += row.figures["text_bytes"]
    return watch, text_bytes / 1e6


def _peer(tokenizer: Tokenizer, paths: Sequence[Path], column: str) -> Seconds:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        tokenizer.save(file)
        peer = gigatoken.Tokenizer(file)
    seconds, _ = measure(lambda: peer.encode_files(ParquetFileSource(list(paths), column), parallel=False))
    return seconds


# --- compilation

ENCODING_CODE = """
import sys, time
times = [time.perf_counter()]
from pipeline.tokenizer.bpe import Tokenizer
times.append(time.perf_counter())
tokenizer = Tokenizer.from_file(sys.argv[1])
times.append(time.perf_counter())
tokenizer.encode_batch(["The first text of a process."])
times.append(time.perf_counter())
tokenizer.encode_batch(["The second text of a process."])
times.append(time.perf_counter())
print(*(after - before for before, after in zip(times, times[1:])))
"""
TRAINING_CODE = """
import time
times = [time.perf_counter()]
from pipeline.tokenizer.training import train_bpe
times += 2 * [time.perf_counter()]
train_bpe(["aa ab", "aa ab"], 260)
times.append(time.perf_counter())
train_bpe(["aa ab", "aa ab"], 260)
times.append(time.perf_counter())
print(*(after - before for before, after in zip(times, times[1:])))
"""


def compilation(tokenizer: Tokenizer, repeats: int) -> Section:
    """Import and first call in new processes: once with nothing compiled, then from what that one kept."""
    section = Section(title="6. Compilation: the first call of a process, wall seconds")
    rows: list[Row] = []
    for name, code in (("encode", ENCODING_CODE), ("train", TRAINING_CODE)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            tokenizer.save(file)
            kernels = Path(folder) / "kernels"
            rows.append(_compile_row(f"{name}, nothing compiled", [_start(code, file, kernels)]))
            rows.append(_compile_row(f"{name}, from the cache", [_start(code, file, kernels) for _ in range(repeats)]))
            size = sum(path.stat().st_size for path in kernels.rglob("*") if path.is_file()) / 1e6
            section.notes.append(f"Kept for {name}: {size:.1f} MB.")
        found = rows[-1]["import + first call"].median
        target = Target(name=f"{name}: import + first call from the cache, s", found=found, limit=1.5, at_least=False)
        section.targets.append(target)
    section.tables.append((f"one process, median of {repeats} processes", rows))
    section.notes.append("Load: tokenizer.json, no kernel in it. Process: all, the start of Python included.")
    return section


def compile_seconds() -> float:
    """Wall seconds of import and first call of training in a process that finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        imports, _, first_call, *_ = _start(TRAINING_CODE, Path(folder), Path(folder) / "kernels")
    return imports + first_call


def _start(code: str, file: Path, kernels: Path) -> tuple[float, ...]:
    """Import, load, first call, second call, the whole process."""
    start = time.perf_counter()
    environment = {**os.environ, "GPT25_KERNEL_CACHE": str(kernels)}
    process = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"error: a process of the compile section failed: {json.dumps(process.stderr[-2000:])}")
    return (*map(float, process.stdout.split()), time.perf_counter() - start)


def _compile_row(name: str, runs: list[tuple[float, ...]]) -> dict[str, Any]:
    imports, loads, first, second, process = (Spread.of(column) for column in zip(*runs, strict=True))
    both = Spread.of(run[0] + run[2] for run in runs)
    milliseconds = Spread.of(1000 * value for value in second.values)
    return {
        "": name,
        "import": imports,
        "load": loads,
        "first call": first,
        "import + first call": both,
        "second call, ms": milliseconds,
        "process": process,
    }
