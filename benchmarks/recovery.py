"""What a killed training worker costs: seconds from the kill to the next finished step, split by part.

    python benchmarks/recovery.py [--size small] [--workers 4] [--kills 5] [--device cpu]

Trains with jobs/pretrain.py on a Ray of its own, kills one worker at a time with SIGKILL, a different rank each time,
and reads the parts from what the new group tells its journal (pipeline/distributed/startup_timer.py). "noticed" is
from the kill until Ray Train begins to end what is left of the old group; "repeated" is from the first finished step
to the first that had not been done before. Printed: every kill, the median, and the slowest imports of a worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import psutil

from benchmarks.overhead import SIZES, write_random_shards

_NEVER = 10**6
_CHECKPOINT_EVERY = 5


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="gpt25-recovery-") as scratch:
        folder = Path(scratch)
        data = write_random_shards(folder / "data", num_tokens=500_000)
        with running_job(arguments, data, folder) as job:
            kills = [one_kill(job, folder / "run" / "tracking.jsonl", number) for number in range(arguments.kills)]
        started = next(line for line in (folder / "job.log").read_text().splitlines() if "started in" in line)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.workers} workers, size {arguments.size}, "
        f"device {arguments.device}"
    )
    print_table(kills)
    print(f"the whole job: {started[started.index('started in') :]}")
    print_imports()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


@contextlib.contextmanager
def running_job(arguments: argparse.Namespace, data: Path, folder: Path) -> Iterator[psutil.Process]:
    """The training job, ended at the end of the context."""
    size = SIZES[arguments.size]
    settings: dict[str, Any] = {
        **size,
        "data": data,
        "output": folder / "run",
        "tokens_per_step": arguments.workers * size["batch_size"] * size["context_length"],
        "train_steps": _NEVER,
        "checkpoint_every": _CHECKPOINT_EVERY,
        "log_every": 1,
        "val_every": _NEVER,
        "sample_every": _NEVER,
        "num_workers": arguments.workers,
        "max_failures": -1,
        "device": arguments.device,
        "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["TMPDIR"] = str(folder)
    with (folder / "job.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    job = psutil.Process(process.pid)
    try:
        yield job
    finally:
        family = [*job.children(recursive=True), job]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=30)


def one_kill(job: psutil.Process, journal: Path, number: int) -> dict[str, float]:
    """Seconds by part, in order."""
    first = wait_for_step(job, journal, after=last_step(journal) + 2 * _CHECKPOINT_EVERY)
    workers = sorted(training_workers(job), key=lambda process: process.pid)
    lost_at = time.time()
    workers[number % len(workers)].kill()
    before = last_step(journal)
    wait_for_step(job, journal, after=max(first, before) + 1)
    entries = [entry for entry in read(journal) if entry["time"] / 1000 > lost_at]
    recovery = next(entry for entry in entries if "recovery/seconds" in entry["values"])
    new = next(entry for entry in entries if "train/loss" in entry["values"] and entry["step"] > before)
    finished, total = recovery["time"] / 1000, recovery["values"]["recovery/seconds"]
    parts = {
        name.removeprefix("recovery/").removesuffix("_seconds").replace("_", " "): seconds
        for name, seconds in recovery["values"].items()
        if name != "recovery/seconds"
    }
    return {
        "noticed": finished - total - lost_at,
        **parts,
        "to the next step": finished - lost_at,
        "repeated": new["time"] / 1000 - finished,
    }


def training_workers(job: psutil.Process) -> list[psutil.Process]:
    return [process for process in job.children(recursive=True) if "RayTrainWorker" in process.name()]


def wait_for_step(job: psutil.Process, journal: Path, *, after: int) -> int:
    deadline = time.monotonic() + 600
    while last_step(journal) < after:
        assert job.is_running() and job.status() != psutil.STATUS_ZOMBIE, (journal.parents[1] / "job.log").read_text()
        assert time.monotonic() < deadline, "the run stands still"
        time.sleep(0.1)
    return last_step(journal)


def last_step(journal: Path) -> int:
    return max((entry["step"] for entry in read(journal) if "train/loss" in entry["values"]), default=0)


def read(journal: Path) -> list[dict[str, Any]]:
    """The metrics in a run's journal."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "metrics"]


def print_table(kills: list[dict[str, float]]) -> None:
    print(f"{'seconds':<18}" + "".join(f"{f'kill {number + 1}':>9}" for number in range(len(kills))) + f"{'median':>9}")
    for part in kills[0]:
        values = [kill[part] for kill in kills]
        print(f"{part:<18}" + "".join(f"{value:9.2f}" for value in [*values, statistics.median(values)]))


def print_imports() -> None:
    """What a worker's imports take when nothing else runs, the largest packages of the outermost level."""
    code = "import ray; import pipeline.training.launch"
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split("|") for line in answer.stderr.splitlines() if line.startswith("import time:")]
    own: dict[str, float] = {}
    for self_us, _, name in lines[1:]:
        package = name.strip().split(".")[0]
        own[package] = own.get(package, 0.0) + int(self_us.split(":")[1]) / 1e6
    largest = sorted(own.items(), key=lambda item: -item[1])[:12]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in largest)
    print(f"imports alone: {sum(own.values()):.2f} s: {parts}")


if __name__ == "__main__":
    main()
