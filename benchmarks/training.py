"""The recipe on a folder of shards for some seconds, by the Trainer: speed, loss, val loss, what a step waits for.

    python benchmarks/training.py --data SHARDS [--optimizer muon] [--seconds 90] [--jsonl FILE]

Part of benchmarks/gpu.py. As many steps as fit into the seconds are found out by ten steps first, so that warm-up and
decay are run through; compilation, evaluation and the checkpoint come on top. Every figure is written as soon as the
Trainer tells it: a run that breaks off, or a sample that cannot be drawn, loses nothing else. Needs neither Ray nor
MLflow. On one GPU a step is what one of the recipe's four does in a step, 131,072 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import forget_compiled
from benchmarks.overhead import write_random_shards
from benchmarks.results import Results, add_result_arguments
from pipeline.config.training import PretrainConfig
from pipeline.distributed.hardware import peak_memory_gib
from pipeline.distributed.process_group import init_distributed
from pipeline.errors import UserError
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 96, "context_length": 32, "tokens_per_step": 256,
             "batch_size": 4, "lr": 4e-3, "sample_tokens": 4},
    "124M": {"num_layers": 12, "num_heads": 12, "d_model": 768, "d_ff": 2048, "context_length": 1024,
             "tokens_per_step": 131_072, "batch_size": 32, "lr": 18e-4, "sample_tokens": 32},
}  # fmt: skip
TRIAL_STEPS = 10


class WritingTracker(MemoryTracker):
    """Writes every figure of a run down when it is told."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics(metrics, step)
        self.results.add("metrics", step=step, **metrics)

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        super().log_sample(step, prompt, text)
        self.results.add("sample", step=step, prompt=prompt, text=text)


def main() -> None:
    arguments = parse()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    results = Results(arguments.jsonl, arguments.label)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_random_shards(Path(scratch) / "data", num_tokens=20_000, vocab_size=257)
        config = run_config(arguments)
        try:
            steps = arguments.train_steps or fitting_steps(config, data, Path(scratch) / "trial", arguments.seconds)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        results.add("schedule", train_steps=steps, tokens_per_step=config.tokens_per_step)
        print(f"{arguments.optimizer}: {steps} steps of {config.tokens_per_step:,} tokens", flush=True)
        config = dataclasses.replace(config, train_steps=steps, val_every=max(1, steps // 3))
        train(config, data, Path(scratch) / "run", results)
    raise SystemExit(1 if results.failures else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of shards; without it random ones, which teach nothing")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--seconds", type=float, default=90, help="of training steps")
    parser.add_argument("--train_steps", type=int, help="so many steps instead, without the ten that find it out")
    parser.add_argument("--size", choices=sorted(SIZES), default="124M")
    parser.add_argument("--batch_size", type=int, help="windows of a micro-batch")
    parser.add_argument("--tokens_per_step", type=int)
    parser.add_argument("--lr", type=float, help="of either optimizer: Muon's steps have the size of AdamW's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_result_arguments(parser)
    return parser.parse_args()


def run_config(arguments: argparse.Namespace) -> PretrainConfig:
    given = {name: getattr(arguments, name) for name in ("batch_size", "tokens_per_step", "lr")}
    settings = SIZES[arguments.size] | {name: value for name, value in given.items() if value is not None}
    return PretrainConfig(
        **settings,
        optimizer=arguments.optimizer,
        device=arguments.device,
        num_workers=1,
        log_every=10,
        train_steps=TRIAL_STEPS,
        val_tokens=2**20,
    )


def fitting_steps(config: PretrainConfig, data: Path, folder: Path, seconds: float) -> int:
    """How many steps take so long, the one that compiles left out; ten at least."""
    trainer = _trainer(config, data, folder, MemoryTracker())
    trainer.train_step(0).loss.item()
    start = time.perf_counter()
    for step in range(1, TRIAL_STEPS):
        result = trainer.train_step(step)
    result.loss.item()
    step_seconds = (time.perf_counter() - start) / (TRIAL_STEPS - 1)
    return max(TRIAL_STEPS, int(seconds / step_seconds))


def train(config: PretrainConfig, data: Path, folder: Path, results: Results) -> None:
    """Runs to the end, or as far as it goes, and prints and writes what is known then."""
    tracker = WritingTracker(results)
    start = time.perf_counter()
    forget_compiled()
    with results.attempt(f"training with {config.optimizer}"):
        trainer = _trainer(config, data, folder, tracker)
        results.add(
            "data",
            train_tokens=len(trainer.train_stream),
            val_tokens=sum(len(source.stream) for source in trainer.val_sources),
        )
        trainer.run()
    report = {"optimizer": config.optimizer, "lr": config.lr, **known(tracker), "seconds": time.perf_counter() - start}
    print(", ".join(f"{name} {value}" for name, value in report.items()), flush=True)
    results.add("training", **report, peak_memory_gib=peak_memory_gib(init_distributed(config.device)))


def known(tracker: MemoryTracker) -> dict[str, float | int]:
    """The newest values that the run has logged, and medians of its speed, which leaves the compiling step out."""

    def last(name: str) -> float:
        return tracker.metrics[name][-1][1] if tracker.metrics[name] else math.nan

    def median(name: str) -> float:
        values = [value for _, value in tracker.metrics[name]]
        return statistics.median(values) if values else math.nan

    steps = tracker.metrics["train/loss"][-1][0] if tracker.metrics["train/loss"] else 0
    return {
        "steps": steps,
        "tokens_seen": int(last("tokens_seen")) if steps else 0,
        "train_loss": last("train/loss"),
        "val_loss": last("val/loss"),
        "tokens_per_second": median("perf/tokens_per_second"),
        "mfu": median("perf/mfu"),
        "data_wait_seconds_per_step": median("perf/data_wait_seconds"),
    }


def _trainer(config: PretrainConfig, data: Path, folder: Path, tracker: MemoryTracker) -> Trainer:
    return Trainer(config, data=data, output=folder, workers=init_distributed(config.device), tracker=tracker)


if __name__ == "__main__":
    main()
