"""The recipe on a folder of shards for some minutes, by the Trainer: speed, loss, what a step waits for.

    python benchmarks/training.py --data SHARDS [--minutes 10] [--json FILE]

Part of benchmarks/gpu.py. A schedule of as many steps as fit is chosen after the first ten, so that warm-up and decay
are run through; needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.config.training import PretrainConfig
from pipeline.distributed.fsdp import join_workers
from pipeline.tracking.tracker import MemoryTracker
from pipeline.training.trainer import Trainer

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 96, "context_length": 32, "tokens_per_step": 256,
             "batch_size": 4, "lr": 4e-3},
    "124M": {"num_layers": 12, "num_heads": 12, "d_model": 768, "d_ff": 2048, "context_length": 1024,
             "tokens_per_step": 524_288, "batch_size": 32, "lr": 18e-4},
}  # fmt: skip
TRIAL_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", choices=sorted(SIZES), default="124M")
    parser.add_argument("--batch_size", type=int, help="windows of a micro-batch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    size = SIZES[arguments.size] | ({"batch_size": arguments.batch_size} if arguments.batch_size else {})
    config = PretrainConfig(**size, num_workers=1, log_every=10, train_steps=TRIAL_STEPS, val_tokens=2**20)
    step_seconds = trial(config, arguments.data)
    steps = max(TRIAL_STEPS, int(arguments.minutes * 60 / step_seconds))
    report = train(dataclasses.replace(config, train_steps=steps, val_every=max(1, steps // 4)), arguments.data)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


def trial(config: PretrainConfig, data: Path) -> float:
    """Seconds of a step, compilation left out."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(config, data, Path(folder), MemoryTracker())
        trainer.train_step(0).loss.item()
        start = time.perf_counter()
        for step in range(1, TRIAL_STEPS):
            result = trainer.train_step(step)
        result.loss.item()
        return (time.perf_counter() - start) / (TRIAL_STEPS - 1)


def train(config: PretrainConfig, data: Path) -> dict[str, Any]:
    """The run's summary, the curve, and seconds over all, evaluation and checkpoints included."""
    tracker = MemoryTracker()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(config, data, Path(folder), tracker)
        start = time.perf_counter()
        summary = trainer.run()
        seconds = time.perf_counter() - start
    waits = [value for _, value in tracker.metrics["perf/data_wait_seconds"]]
    return {
        **dataclasses.asdict(summary),
        "seconds": seconds,
        "tokens_per_second_over_all": summary.tokens_seen / seconds,
        "data_wait_seconds_per_step": sum(waits) / len(waits),
        "train_loss": tracker.metrics["train/loss"],
        "val_loss_curve": tracker.metrics["val/loss"],
    }


def _trainer(config: PretrainConfig, data: Path, folder: Path, tracker: MemoryTracker) -> Trainer:
    return Trainer(config, data=data, output=folder, workers=join_workers(config.device), tracker=tracker)


if __name__ == "__main__":
    main()
