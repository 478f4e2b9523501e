"""All that is to be known of a GPU machine, by one command.

    python benchmarks/gpu.py --output FOLDER [--data SHARDS] [--minutes 10] [--parts correctness steps ...]

Parts, each a process of its own, its output in FOLDER/NAME.txt and its figures in FOLDER/NAME.json:

    correctness  every kernel path against float32; nothing waits for the device; repeated steps have the same bits
    steps        benchmarks/train_step.py with micro-batches of 16, 32 and 64 windows, all peers beside it
    free         the same for 32 windows where our steps need not repeat their bits: what that promise costs
    fsdp         ours with FSDP2 over one rank
    overhead     benchmarks/overhead.py
    training     the recipe on SHARDS for some minutes, by the Trainer (left out without --data)
    generation   benchmarks/generation.py

On a CPU the same parts run with a tiny network: a check that the command works. Ends with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path[0] = str(ROOT)

import torch

Commands = dict[str, list[str]]


def main() -> None:
    arguments = parse()
    on_gpu = torch.cuda.is_available()
    commands = gpu_commands(arguments) if on_gpu else tiny_commands(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in commands if name in (arguments.parts or commands)]
    failed = [name for name in chosen if not run(name, commands[name], arguments.output)]
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}; see {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for what the parts print and measure")
    parser.add_argument("--data", type=Path, help="folder of shards for the training part")
    parser.add_argument("--minutes", type=float, default=10, help="of the training part")
    parser.add_argument("--parts", nargs="+", help="these alone")
    return parser.parse_args()


def gpu_commands(arguments: argparse.Namespace) -> Commands:
    step = [str(BENCHMARKS / "train_step.py"), "--repeats", "5", "--steps", "10"]
    commands = {
        "correctness": [str(BENCHMARKS / "gpu_correctness.py")],
        "steps": [*step, "--micro_batch", "16", "32", "64"],
        "free": [*step, "--micro_batch", "32", "--contestants", "ours", "ours compiled", "--repeatable", "off"],
        "fsdp": [*step, "--micro_batch", "32", "--contestants", "ours", "ours compiled", "--fsdp"],
        "overhead": [str(BENCHMARKS / "overhead.py"), "--repeats", "5", "--steps", "20"],
    }
    return commands | further_commands(arguments, tiny=False)


def tiny_commands(arguments: argparse.Namespace) -> Commands:
    step = [str(BENCHMARKS / "train_step.py"), "--preset", "tiny", "--repeats", "1"]
    ours = ["--contestants", "ours"]
    commands = {
        "correctness": [str(BENCHMARKS / "gpu_correctness.py"), "--preset", "tiny"],
        "steps": [*step, "--micro_batch", "1", "2", "--contestants", "ours", "llama", "gpt2"],
        "free": [*step, *ours, "--repeatable", "off"],
        "fsdp": [*step, *ours, "--fsdp"],
        "overhead": [str(BENCHMARKS / "overhead.py"), "--size", "tiny", "--repeats", "1", "--steps", "2"],
    }
    return commands | further_commands(arguments, tiny=True)


def further_commands(arguments: argparse.Namespace, *, tiny: bool) -> Commands:
    commands: Commands = {}
    if arguments.data:
        size = "tiny" if tiny else "124M"
        training = [str(BENCHMARKS / "training.py"), "--data", str(arguments.data), "--size", size]
        commands["training"] = [*training, "--minutes", str(arguments.minutes)]
    generation = BENCHMARKS / "generation.py"
    if generation.is_file() and not tiny:
        commands["generation"] = [str(generation)]
    return commands


def run(name: str, command: list[str], output: Path) -> bool:
    """Runs one part to its end; True if it went well."""
    figures = [] if name in ("correctness", "generation") else ["--json", str(output / f"{name}.json")]
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    with (output / f"{name}.txt").open("w") as file:
        result = subprocess.run(
            [sys.executable, *command, *figures], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False
        )
    seconds = time.perf_counter() - start
    print(f"{name}: {'done' if result.returncode == 0 else 'FAILED'} after {seconds:.0f} s", flush=True)
    return result.returncode == 0


if __name__ == "__main__":
    main()
