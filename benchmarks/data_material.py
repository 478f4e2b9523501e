"""What the sections of benchmarks/data_pipeline.py work on: folders of links, a tokenizer, runs of the whole job.

MB is 10^6 bytes of UTF-8 text. Seconds are wall seconds: the job has many processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bpe_report import ROOT
from pipeline.config.data import TokenizeConfig
from pipeline.dataset import verification
from pipeline.dataset.dataset import save_tokenizer
from pipeline.preprocessing import stages, tokenization
from pipeline.sources import plan as plan_module
from pipeline.sources import sources
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import Flush, open_folder
from pipeline.tokenizer import bpe
from pipeline.tokenizer.bpe import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Material:
    """The same for all sections."""

    paths: tuple[Path, ...]
    """Files of parquet."""
    column: str
    tokenizer: Path
    folder: Path
    """For what is thrown away; on the disk that is measured."""
    num_workers: int
    repeats: int
    peer_python: str | None
    """The interpreter of an environment that has datatrove."""

    @contextlib.contextmanager
    def links(self, copies: int) -> Iterator[Path]:
        """A folder in which every file stands ``copies`` times under different names."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            for copy in range(copies):
                for path in self.paths:
                    (Path(temporary) / f"{copy:02d}-{path.name}").symlink_to(path.absolute())
            yield Path(temporary)

    @contextlib.contextmanager
    def output(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            yield Path(temporary) / "output"

    def config(self, source: Path | str, output: Path, **settings: Any) -> TokenizeConfig:
        values = {"text_column": self.column, "tokenizer": str(self.tokenizer), "num_workers": self.num_workers}
        return TokenizeConfig(source=str(source), output=str(output), **{**values, **settings})


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the whole job, from nothing to a manifest."""

    seconds: float
    verify_seconds: float
    megabytes: float
    tokens: int
    items: int


def run_job(material: Material, source: Path | str, **settings: Any) -> Run:
    """Claim to manifest on the Ray that runs, then all shards read again; a wrong one ends the benchmark."""
    with material.output() as output:
        folder = open_folder(output)
        start = time.perf_counter()
        summary = tokenization.tokenize(material.config(source, output, **settings), folder)
        written = time.perf_counter()
        problems = verification.verify(folder, num_threads=material.num_workers)
        if problems:
            raise SystemExit(f"error: {problems[0]}")
        return Run(
            seconds=written - start,
            verify_seconds=time.perf_counter() - written,
            megabytes=summary.text_bytes / 1e6,
            tokens=summary.tokens,
            items=summary.num_items,
        )


def make_job(config: TokenizeConfig) -> tuple[list[WorkItem], stages.EncodeJob]:
    """What tokenization.tokenize tells its tasks, for those who call them on their own; the output folder is made."""
    layouts = sources.find(config.source).layouts(config.text_column)
    items = plan_module.make_plan(layouts, text_column=config.text_column, item_bytes=config.item_bytes)
    folder, tokenizer = open_folder(config.output), Tokenizer.from_file(str(config.tokenizer))
    folder.make()
    save_tokenizer(folder, tokenizer)
    return items, stages.EncodeJob(
        output=config.output,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        settings="{}",
        val_fraction=config.val_fraction,
        part_bytes=2 * config.item_bytes,
        skip=(),
        num_items=len(items),
    )


# ---- bare: no Ray, no resume state -----------------------------------------------------------------------------------


def run_bare(
    material: Material, source: Path, num_processes: int, *, flush: Flush = "nothing"
) -> tuple[list[float], list[float]]:
    """MB/s of each of ``num_processes``, which start together on a core and a share of the files each; and their MB.

    A process has loaded tokenizer, kernels and libraries before.
    """
    paths = sorted(map(str, source.iterdir()))
    with material.output() as output:
        processes = []
        for number in range(num_processes):
            share = paths[number::num_processes]
            config = material.config(source, output / str(number))
            command = [sys.executable, "-m", "benchmarks.data_bare", str(number), json.dumps(share), config.output]
            command += [str(material.tokenizer), material.column, flush]
            processes.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdin is not None and process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise SystemExit("error: a bare process did not get ready")
        for process in processes:
            process.stdin.write(b"go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        found = [json.loads(process.communicate()[0]) for process in processes]
    return [one["megabytes"] / one["seconds"] for one in found], [one["megabytes"] for one in found]


# ---- Ray -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_ray(material: Material, variables: dict[str, str] | None = None) -> Iterator[None]:
    """A local Ray, whose workers have done a first job: processes started, kernels and tokenizer loaded."""
    import ray

    bpe.warm_up()
    environment = {"PYTHONPATH": str(ROOT), **(variables or {})}
    ray.init(
        address="local",  # whatever cluster this machine has besides
        num_cpus=material.num_workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment},
    )
    try:
        warm_up(material)
        yield
    finally:
        ray.shutdown()


def warm_up(material: Material) -> None:
    """A job of many tiny items."""
    with tiny_files(material, 20 * material.num_workers) as source:
        run_job(material, source, item_bytes=1)


@contextlib.contextmanager
def tiny_files(material: Material, num_files: int) -> Iterator[Path]:
    """A folder of text files of a line each."""
    with tempfile.TemporaryDirectory(dir=material.folder) as temporary:
        for number in range(num_files):
            (Path(temporary) / f"{number:06d}.txt").write_text(f"This is text {number}, and it is short.\n")
        yield Path(temporary)


def speeds(runs: Sequence[Run], *, verified: bool = False) -> list[float]:
    """MB/s of each."""
    return [run.megabytes / (run.seconds + verified * run.verify_seconds) for run in runs]
