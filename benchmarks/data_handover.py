"""What it costs to hand work over: the graph against one task doing all, and files fetched first against local ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from benchmarks.bpe_report import ROOT, Row, Section, Spread, Target, quotients
from benchmarks.data_material import Material, make_job, run_job, running_ray
from pipeline.preprocessing import ray_dataflow, stages
from pipeline.preprocessing.rows import ItemRow
from pipeline.sources.work_items import WorkItem
from pipeline.tokenizer.bpe import Tokenizer

SHARE_OF_ONE_TASK = 0.8  # the least share of one task's speed that the graph has to keep

HUB_SOURCE = "hf://datasets/someone/texts"
HUB_CODE = """
import sys
from pathlib import Path
from tests.support.fake_hub import running_hub
files = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
with running_hub(files) as hub:
    print(hub.url, flush=True)
    sys.stdin.readline()
"""


def handover(material: Material, copies: int) -> Section:
    """Three ways over the same files, taking turns."""
    section = Section(title=f"2. Handing over, {material.num_workers} workers")
    one_task: list[float] = []
    local: list[float] = []
    fetched: list[float] = []
    with (
        material.links(copies) as source,
        _hub(source) as url,
        tempfile.TemporaryDirectory(dir=material.folder) as cache,
    ):
        variables = {"HF_ENDPOINT": url, "GPT25_CACHE": cache, "NO_PROXY": "127.0.0.1,localhost"}
        with mock.patch.dict(os.environ, variables), running_ray(material, variables):
            run_job(material, HUB_SOURCE)  # processes that fetch have started
            for _ in range(material.repeats):
                one_task.append(_one_task(material, source))
                run = run_job(material, source)
                local.append(run.megabytes / run.seconds)
                run = run_job(material, HUB_SOURCE)
                fetched.append(run.megabytes / run.seconds)
    rows: list[Row] = []
    for name, values in (
        ("plain Ray tasks, one per item, doing all", one_task),
        ("the job, local files", local),
        ("the job, files from a hub on this machine", fetched),
    ):
        rows.append({"": name, "MB/s": Spread.of(values), "of one task": quotients(values, one_task)})
    section.tables.append((f"{run.megabytes:,.0f} MB, {run.items} items", rows))
    section.notes += [
        "Plain tasks: encoding and writing only; plan and tokenizer are made before, there is no manifest behind.",
        "The hub is a Python process on the same cores, and the files are checked against their sha256.",
    ]
    for name, values in (("local files", local), ("files from a hub", fetched)):
        found = quotients(values, one_task).median
        section.targets.append(Target(name=f"{name} / one task doing all", found=found, limit=SHARE_OF_ONE_TASK))
    return section


def _one_task(material: Material, source: Path) -> float:
    """MB/s of ray.remote functions, one per item, as many at a time as there are workers."""
    import ray

    def work(item: WorkItem, job: stages.EncodeJob) -> int:
        num_bytes = 0
        steps: ray_dataflow.Stages = [(stages.encode, {"job": job}), (stages.write, {"job": job})]
        for table in ray_dataflow.in_turn(ItemRow.of(item).to_table(), steps):
            row = ItemRow.from_table(table)
            row.raise_error()
            num_bytes += row.figures["text_bytes"]
        return num_bytes

    with material.output() as output:
        items, job = make_job(material.config(source, output))
        assert isinstance(job.tokenizer, Tokenizer)
        job = dataclasses.replace(job, tokenizer=ray.put(job.tokenizer))
        task = ray.remote(num_cpus=1)(work)
        start = time.perf_counter()
        num_bytes = sum(ray.get([task.remote(item, job) for item in items]))
        return num_bytes / 1e6 / (time.perf_counter() - start)


@contextlib.contextmanager
def _hub(source: Path) -> Iterator[str]:
    """The tests' hub with the files of a folder, in a process of its own."""
    command = [sys.executable, "-c", HUB_CODE, str(source)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("error: the local hub did not start")
        yield url
    finally:
        process.stdin.close()
        process.wait()
