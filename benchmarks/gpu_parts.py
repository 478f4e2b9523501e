"""The parts of benchmarks/gpu.py: what each answers, how long it may take, and its commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import read_results

BENCHMARKS = Path(__file__).resolve().parent

STEP = ("train_step.py", "--device", "cuda", "--repeats", "3", "--steps", "20")
OURS = ("--contestants", "ours compiled", "--profile", "off")
TINY_STEP = ("train_step.py", "--device", "cpu", "--preset", "tiny", "--repeats", "1", "--steps", "1")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question to a GPU machine."""

    name: str
    answers: str
    """In a few words, for --help."""
    estimated_seconds: int
    """On an H100, compilation included; never measured."""
    slack_seconds: int
    """What it may take beyond the estimate before it is stopped."""
    command: tuple[str, ...]
    """Script in this folder, and its arguments."""
    tiny: tuple[str, ...]
    """The same for a rehearsal."""
    optimizers: tuple[str, ...] = field(default=())
    """The command is run once with each of them."""

    @property
    def estimate(self) -> str:
        """For --help."""
        times = f"{len(self.optimizers)} x " if self.optimizers else ""
        return f"{times}{self.estimated_seconds} s"

    def limit_seconds(self, training_seconds: float) -> float:
        """Of one command; the estimate of training is for 90 seconds of steps."""
        longer = training_seconds - 90 if self.optimizers else 0
        return self.estimated_seconds + longer + self.slack_seconds


_ALL = (
    Part(
        name="machine",
        answers="driver, versions, attention's priority and times, ceilings of products and memory",
        estimated_seconds=15,
        slack_seconds=30,
        command=("gpu_machine.py", "--device", "cuda"),
        tiny=("gpu_machine.py", "--device", "cpu"),
    ),
    Part(
        name="headline",
        answers="ours compiled beside Llama compiled, micro-batches of 32 windows: tokens/s, MFU, ratio",
        estimated_seconds=120,
        slack_seconds=90,
        command=(*STEP, "--micro_batch", "32", "--contestants", "ours compiled", "llama compiled"),
        tiny=(*TINY_STEP, "--contestants", "ours compiled", "llama compiled"),
    ),
    Part(
        name="nondeterministic",
        answers="ours with deterministic mode off: what equal bits cost",
        estimated_seconds=60,
        slack_seconds=40,
        command=(*STEP, *OURS, "--micro_batch", "32", "--deterministic", "off"),
        tiny=(*TINY_STEP, *OURS, "--deterministic", "off"),
    ),
    Part(
        name="batch64",
        answers="ours with micro-batches of 64 windows",
        estimated_seconds=65,
        slack_seconds=40,
        command=(*STEP, *OURS, "--micro_batch", "64"),
        tiny=(*TINY_STEP, *OURS, "--micro_batch", "4"),
    ),
    Part(
        name="fsdp2",
        answers="ours sharded by FSDP2 over one rank, with NCCL",
        estimated_seconds=65,
        slack_seconds=40,
        command=(*STEP, *OURS, "--micro_batch", "32", "--fsdp"),
        tiny=(*TINY_STEP, *OURS, "--fsdp"),
    ),
    Part(
        name="embedding",
        answers="the embedding's gradient by each way: time, error, equal bits in three runs",
        estimated_seconds=20,
        slack_seconds=25,
        command=("embedding_gradient.py", "--device", "cuda"),
        tiny=("embedding_gradient.py", "--device", "cpu", "--rows", "500", "--vocab_size", "300", "--width", "16"),
    ),
    Part(
        name="correctness",
        answers="every kernel path against float32, equal bits, nothing waits for the GPU; cheap checks first",
        estimated_seconds=110,
        slack_seconds=90,
        command=("gpu_correctness.py", "--device", "cuda"),
        tiny=("gpu_correctness.py", "--device", "cpu", "--preset", "tiny", "--compiled_layers", "1"),
    ),
    Part(
        name="training",
        answers="with AdamW, then Muon, on --data: val loss, speed (the second call)",
        estimated_seconds=180,
        slack_seconds=60,
        command=("training.py", "--device", "cuda"),
        tiny=("training.py", "--device", "cpu", "--size", "tiny"),
        optimizers=("adamw", "muon"),
    ),
    Part(
        name="overhead",
        answers="the Trainer around the step beside a bare loop (in neither call)",
        estimated_seconds=90,
        slack_seconds=60,
        command=("overhead.py", "--device", "cuda", "--repeats", "5", "--steps", "20"),
        tiny=("overhead.py", "--device", "cpu", "--size", "tiny", "--repeats", "1", "--steps", "2"),
    ),
)
PARTS = {part.name: part for part in _ALL}
FIRST_CALL = tuple(name for name in PARTS if name not in ("training", "overhead"))
"""In the order of what is wanted first, should the time run out."""


def commands(part: Part, arguments: argparse.Namespace, jsonl: Path) -> Iterator[tuple[str, list[str]]]:
    """(label, command) of each process of a part; the second of training makes as many steps as the first."""
    script, *rest = part.tiny if arguments.rehearse else part.command
    command = [str(BENCHMARKS / script), *rest]
    if not part.optimizers:
        yield part.name, command
        return
    command += ["--data", str(arguments.data)] if arguments.data else []
    seconds = 0 if arguments.rehearse else arguments.seconds
    num_earlier = len(read_results(jsonl))
    for optimizer in part.optimizers:
        rows = read_results(jsonl)[num_earlier:]
        steps = arguments.train_steps or next((row["train_steps"] for row in rows if row["result"] == "schedule"), None)
        length = ["--train_steps", str(steps)] if steps else ["--seconds", str(seconds)]
        yield f"{part.name} {optimizer}", [*command, "--optimizer", optimizer, *length]
