"""The whole job: against bare cores, against datatrove, and over thousands of tiny items."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bpe_report import Row, Section, Spread, Target, quotients
from benchmarks.data_material import (
    Material,
    Run,
    make_job,
    run_bare,
    run_job,
    running_ray,
    speeds,
    tiny_files,
)
from pipeline.preprocessing import ray_dataflow, stages
from pipeline.preprocessing.rows import ItemRow

_PEERS = {"in order": "datatrove, documents in order", "recipe": "datatrove's recipe: shuffled, merged, shuffled"}
SHARE_OF_CORES, TIMES_DATATROVE, ITEM_MILLISECONDS, DRIVER_MEGABYTES = 0.8, 50.0, 15.0, 1000.0


def job(material: Material, copies: int) -> Section:
    """Bare on one core, bare on all at once, the job with one worker per core; the three take turns."""
    cores = material.num_workers
    section = Section(title=f"1. The whole job on {cores} cores against cores x one bare core")
    with running_ray(material):
        for number in (1, copies):
            with material.links(number) as source:
                alone: list[float] = []
                flushed: list[float] = []
                together: list[float] = []
                runs: list[Run] = []
                for _ in range(material.repeats):
                    alone += run_bare(material, source, 1)[0]
                    flushed += run_bare(material, source, 1, flush="content")[0]
                    together.append(sum(run_bare(material, source, cores)[0]))
                    runs.append(run_job(material, source))
            _add_job(section, cores, {"one bare core": alone, "the same, its shards flushed": flushed}, together, runs)
    section.notes += [
        "Bare: decoding, split, encoding, shards with checksums; a process that has loaded kernels and tokenizer.",
        "Nothing waits for the disk, but in the second line, where shards are written as the job does it.",
        "The job: from the claim of the folder to the manifest, on a Ray that has done a job before; then the same",
        "with the time to verify all shards. One bare core is alone on the machine.",
    ]
    return section


def _add_job(
    section: Section, cores: int, bare: dict[str, list[float]], together: list[float], runs: list[Run]
) -> None:
    ideal = [cores * speed for speed in bare["one bare core"]]
    rows: list[Row] = []
    verified = speeds(runs, verified=True)
    for name, values in (
        *bare.items(),
        (f"{cores} bare cores at once", together),
        ("the job", speeds(runs)),
        ("the job, and verifying", verified),
    ):
        share = quotients(values, ideal)
        rows.append({"": name, "MB/s": Spread.of(values), f"of {cores} x one bare core": share})
    seconds = Spread.of(run.seconds for run in runs)
    caption = (
        f"{runs[0].megabytes:,.0f} MB, {runs[0].items} items, {runs[0].tokens:,} tokens; the job's seconds {seconds}"
    )
    section.tables.append((caption, rows))
    for name, values in (("the job", speeds(runs)), ("the job, and verifying", verified)):
        found = quotients(values, ideal).median
        target = f"{name}, {runs[0].megabytes:,.0f} MB, share of cores x one bare core"
        section.targets.append(Target(name=target, found=found, limit=SHARE_OF_CORES))


# ---- datatrove -------------------------------------------------------------------------------------------------------


def peer(material: Material) -> Section:
    """Once, because it takes minutes, between two runs of ours."""
    section = Section(title="3. datatrove's tokenization of the same files, on the same cores")
    python = material.peer_python or sys.executable
    if subprocess.run([python, "-c", "import datatrove"], capture_output=True, check=False).returncode:
        section.notes.append(f"Not measured: {python} has no datatrove; name one that has it with --peer_python.")
        return section
    with running_ray(material), material.links(1) as source:
        before = run_job(material, source)
        theirs = _run_peer(material, python, source)
        runs = [before, run_job(material, source)]
    ours = Spread.of(speeds(runs))
    rows: list[Row] = [{"": "ours", "MB/s": ours, "ours / it": 1.0}]
    for name, what in _PEERS.items():
        if theirs["tokens"][name] != before.tokens:
            raise SystemExit(f"error: datatrove wrote {theirs['tokens'][name]:,} tokens, ours are {before.tokens:,}")
        speed = before.megabytes / theirs["seconds"][name]
        rows.append({"": what, "MB/s": speed, "ours / it": ours.median / speed})
        section.targets.append(Target(name=f"ours / {what}", found=ours.median / speed, limit=TIMES_DATATROVE))
    section.tables.append((f"{before.megabytes:,.0f} MB, {before.tokens:,} tokens from each", rows))
    section.notes += [
        "Ours ends with a manifest that has the checksum of every shard; datatrove's ends with files of tokens.",
        "Documents in order is what our shards hold too. Its recipe shuffles, which we do when a model reads them.",
    ]
    return section


def _run_peer(material: Material, python: str, source: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("data_peer.py")
    with tempfile.TemporaryDirectory(dir=material.folder) as output:
        values = [source, output, material.tokenizer, material.column, material.num_workers]
        command = [python, str(script), *map(str, values)]
        process = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"error: datatrove failed: {process.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


# ---- tiny items ------------------------------------------------------------------------------------------------------


def items(material: Material, num_items: int) -> Section:
    """An item of one line has nothing but overhead."""
    section = Section(title=f"4. {num_items:,} items of one line each")
    with running_ray(material), tiny_files(material, num_items) as source:
        with _growth() as growth:
            run = run_job(material, source, item_bytes=1)
        bare_seconds = _without_ray(material, source)
    worker_milliseconds = 1000 * run.seconds * material.num_workers / run.items
    rows: list[Row] = [
        {"": "the job, of a worker's time", "ms an item": worker_milliseconds},
        {"": "the job, of wall time", "ms an item": 1000 * run.seconds / run.items},
        {"": "its stages called without Ray", "ms an item": 1000 * bare_seconds / run.items},
    ]
    section.tables.append((f"claim to manifest in {run.seconds:.1f} s, {material.num_workers} workers", rows))
    section.notes.append(f"The driver's memory grew by {growth[0]:.0f} MB.")
    section.targets += [
        Target(name="a worker's time, ms an item", found=worker_milliseconds, limit=ITEM_MILLISECONDS, at_least=False),
        Target(name="growth of the driver, MB", found=growth[0], limit=DRIVER_MEGABYTES, at_least=False),
    ]
    return section


def _without_ray(material: Material, source: Path) -> float:
    """Seconds of encoding and writing all items, one after the other."""
    with material.output() as output:
        work, job = make_job(material.config(source, output, item_bytes=1))
        steps: ray_dataflow.Stages = [(stages.encode, {"job": job}), (stages.write, {"job": job})]
        start = time.perf_counter()
        for item in work:
            for table in ray_dataflow.in_turn(ItemRow.of(item).to_table(), steps):
                ItemRow.from_table(table).raise_error()
        return time.perf_counter() - start


@contextmanager
def _growth() -> Iterator[list[float]]:
    """MB that this process grew by at most, while the block ran."""
    process, end, highest = psutil.Process(), threading.Event(), [0.0]
    before = process.memory_info().rss

    def look() -> None:
        while not end.wait(0.5):
            highest[0] = max(highest[0], (process.memory_info().rss - before) / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        end.set()
        thread.join()
