"""What is to be known of a GPU machine, by two commands, the second for the training of real text.

    python benchmarks/gpu.py --output FOLDER
    python benchmarks/gpu.py --output FOLDER --part training --data SHARDS
    python benchmarks/gpu.py --output FOLDER --rehearse         both tiny, on a CPU: a check that they work
    python benchmarks/gpu.py --output FOLDER --rehearse quick   the same without torch.compile, which takes most of it

FOLDER then holds gpu.log, everything that was printed, and gpu.jsonl, every result as one JSON line; both are written
while the parts run. Each part is a process of its own with a time limit of its own: one that fails or hangs costs
itself alone, and is stopped. Needs torch, numpy, transformers, numba, pyarrow, safetensors and xxhash, neither Ray nor
MLflow. Ends with 1 if a part failed. Parts, and the seconds they are estimated to take on an H100:

"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.gpu_parts import FIRST_CALL, PARTS, Part, commands
from benchmarks.gpu_run import Log, Process, run_part
from benchmarks.gpu_summary import summarize
from benchmarks.results import Results, read_results


def main() -> None:
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part is stopped with this process
    names = arguments.part or [*FIRST_CALL, *(["training"] if arguments.rehearse else [])]
    with Log(arguments.output / "gpu.log") as log:
        log.write(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')}: {' '.join(sys.argv)}")
        num_earlier = len(read_results(arguments.output / "gpu.jsonl"))
        failed = run_parts([PARTS[name] for name in names], arguments, log)
        for line in summarize(read_results(arguments.output / "gpu.jsonl")[num_earlier:]):
            log.write(line)
        if failed:
            log.write(f"error: failed: {', '.join(failed)}; see {arguments.output / 'gpu.log'}")
    raise SystemExit(1 if failed else 0)


def run_parts(parts: list[Part], arguments: argparse.Namespace, log: Log) -> list[str]:
    """Runs them in order, as long as time is left; returns the names of those that did not go well."""
    end = time.monotonic() + arguments.limit
    failed = []
    part_environment = environment(arguments.rehearse)
    jsonl = arguments.output.resolve() / "gpu.jsonl"
    for part in parts:
        for label, command in commands(part, arguments, jsonl):
            left = end - time.monotonic()
            limit = left if arguments.rehearse else min(left, part.limit_seconds(arguments.seconds))
            full = [sys.executable, *command, "--jsonl", str(jsonl), "--label", label]
            if not run_part(Process(full, limit, part_environment), Results(jsonl, label), log):
                failed.append(label)
    return failed


def parse() -> argparse.Namespace:
    rows = [f"    {part.name:18}{part.estimate:>9}  {part.answers}" for part in PARTS.values()]
    total = sum(PARTS[name].estimated_seconds for name in FIRST_CALL)
    text = "\n".join([*rows, f"\nThe first call is estimated at {total} seconds; its limit is 480."])
    parser = argparse.ArgumentParser(
        description=(__doc__ or "") + text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.log and gpu.jsonl, which grow")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="these alone; without it, the first call's")
    parser.add_argument("--data", type=Path, help="folder of shards for the part training")
    parser.add_argument("--seconds", type=float, default=90, help="of training steps, for each optimizer")
    parser.add_argument("--train_steps", type=int, help="training steps, instead of as many as fit into the seconds")
    parser.add_argument("--limit", type=float, help="seconds for everything; 480, or 3600 for a rehearsal")
    rehearse = "both calls, tiny, on a CPU; quick: nothing is compiled"
    parser.add_argument("--rehearse", nargs="?", choices=["full", "quick"], const="full", help=rehearse)
    arguments = parser.parse_args()
    arguments.limit = arguments.limit or (3600 if arguments.rehearse else 480)
    if arguments.part and "training" in arguments.part and not arguments.data and not arguments.rehearse:
        parser.error("the part training needs --data, a folder of shards as jobs/tokenize.py writes it")
    if arguments.data and not (arguments.data / "manifest.json").is_file():
        parser.error(f"--data {arguments.data} holds no manifest.json; make it with jobs/tokenize.py")
    return arguments


def environment(rehearsal: str | None) -> dict[str, str]:
    """Of the parts."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a part prints is seen at once
    if rehearsal:
        found["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread: several wait for each other on a busy machine
    if rehearsal == "quick":
        found["TORCHDYNAMO_DISABLE"] = "1"
    return found


if __name__ == "__main__":
    main()
