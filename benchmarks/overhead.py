"""What everything around the step costs: the Trainer beside a bare loop over the same steps, taking turns.

    python benchmarks/overhead.py [--data FOLDER] [--repeats 5] [--steps 10] [--jsonl FILE]

The bare loop is forward, backward, clipping and update on one batch that is there already, the same program as the
Trainer's: deterministic, compiled, gradients reduced once. The Trainer reads its batches from shards, counts, logs
every 10 steps to a tracker in memory and writes checkpoints in the background. The figure is the median over the
repeats of (Trainer's seconds) / (bare seconds of the same repeat) - 1. Without --data random tokens are written as
shards. Ray Train and MLflow: docs/performance.md says how they are measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.measuring import wait
from benchmarks.results import Results, add_result_arguments
from model.optimizer import clip_by_norm, local_squared_norm
from model.transformer import Transformer, init_weights
from pipeline.config.training import PretrainConfig
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import shard_parts
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, parallelize, set_gradient_sync
from pipeline.distributed.hardware import compute_dtype
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.storage.folders import write_atomically
from pipeline.tokenizer.training import train_bpe
from pipeline.training.optimizer import build_optimizer, compiles
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_heads": 2, "d_model": 64, "d_ff": 176, "context_length": 64, "batch_size": 2},
    "small": {"num_layers": 4, "num_heads": 4, "d_model": 256, "d_ff": 704, "context_length": 256, "batch_size": 8},
    "124M": {"num_layers": 12, "num_heads": 12, "d_model": 768, "d_ff": 2048, "context_length": 1024, "batch_size": 32},
}
MICRO_BATCHES = 2


def main() -> None:
    arguments = parse()
    workers = init_distributed(arguments.device)
    results = Results(arguments.jsonl, arguments.label)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_random_shards(Path(scratch) / "data", num_tokens=500_000)
        config = run_config(arguments, workers, Path(scratch))
        trainer = Trainer(config, data=data, output=Path(scratch) / "run", workers=workers, tracker=MemoryTracker())
        bare = BareStep(config, trainer, workers)
        trained = trainer_step(trainer)
        trained()
        bare()
        pairs = []
        for _ in range(arguments.repeats):
            pairs.append([seconds_of(step, arguments.steps, workers) for step in (bare, trained)])
            results.add("turn", steps=arguments.steps, bare_seconds=pairs[-1][0], trainer_seconds=pairs[-1][1])
        trainer.writer.wait()
    overheads = sorted(around / alone - 1 for alone, around in pairs)
    step_seconds = statistics.median(alone for alone, _ in pairs) / arguments.steps
    print(
        f"bare step {step_seconds * 1000:.1f} ms; Trainer around it {statistics.median(overheads):+.2%} "
        f"({overheads[0]:+.2%}..{overheads[-1]:+.2%}), {arguments.repeats} repeats of {arguments.steps} steps"
    )
    results.add("overhead", step_seconds=step_seconds, overheads=overheads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of shards")
    parser.add_argument("--size", choices=sorted(SIZES), help="124M on a GPU, small on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpoint_every", type=int, default=1000, help="steps; a checkpoint within a repeat counts")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_result_arguments(parser)
    return parser.parse_args()


def run_config(arguments: argparse.Namespace, workers: ProcessGroup, scratch: Path) -> PretrainConfig:
    size = SIZES[arguments.size or ("124M" if workers.device.type == "cuda" else "small")]
    never = 10**9
    return PretrainConfig(
        **size,
        tokens_per_step=MICRO_BATCHES * size["batch_size"] * size["context_length"],
        train_steps=never,
        num_workers=1,
        compile=arguments.compile,
        checkpoint_every=arguments.checkpoint_every,
        val_every=never,
        sample_every=never,
        output=str(scratch / "run"),
    )


def trainer_step(trainer: Trainer) -> Callable[[], None]:
    """The trainer's loop body, its steps going on from call to call."""
    steps = iter(range(10**9))

    def step() -> None:
        number = next(steps)
        trainer.advance(number)

    return step


class BareStep:
    """The Trainer's step without the Trainer: the same network, optimizer, micro-batches (of step 0) and modes."""

    def __init__(self, config: PretrainConfig, trainer: Trainer, workers: ProcessGroup) -> None:
        self.config, self.workers = config, workers
        self.model = Transformer(trainer.model_config)
        init_weights(self.model, config.seed)
        dtype = compute_dtype(config.precision, workers.device)
        parallelize(self.model, workers, dtype=dtype, compile_blocks=compiles(config, workers))
        self.optimizer = build_optimizer(self.model, config, workers)
        self.batches = list(trainer.loader.step(0))
        self.allowed = torch.ones((), dtype=torch.bool, device=workers.device)

    def __call__(self) -> None:
        with deterministic(self.workers.device):
            loss = torch.zeros((), device=self.workers.device)
            for index, batch in enumerate(self.batches):
                set_gradient_sync(self.model, enabled=index == len(self.batches) - 1)
                micro_loss = self.model(batch.inputs, batch.targets) * batch.weight
                micro_loss.backward()
                loss += micro_loss.detach()
            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            grad_norm = self.workers.sum(local_squared_norm(gradients)).sqrt()
            clip_by_norm(gradients, grad_norm, self.config.grad_clip)
            self.optimizer.step(allowed=self.allowed)
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(step: Callable[[], None], num_steps: int, workers: ProcessGroup) -> float:
    wait(workers.device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait(workers.device)
    return time.perf_counter() - start


def write_random_shards(folder: Path, num_tokens: int, vocab_size: int = 50_257) -> Path:
    """A folder of shards as jobs/tokenize.py leaves it, of random ids, as many as GPT-2 has; they train nothing."""
    folder.mkdir(parents=True)
    tokenizer = train_bpe(["a"], 257)
    tokenizer.save(folder / "tokenizer.json")
    generator = np.random.default_rng(0)
    shards = []
    for split, count in (("train", num_tokens), ("val", 5000)):
        tokens = generator.integers(0, vocab_size, count).astype(np.uint16)
        name = f"{split}_000000.bin"
        digest = write_atomically(folder / name, shard_parts(tokens, vocab_size=vocab_size))
        entry = ShardEntry(
            name=name, split=split, tokens=count, documents=1, text_bytes=count, sha256=digest, source="random"
        )
        shards.append(entry)
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size,
        eot_id=tokenizer.eot_id,
        settings={},
        inputs=(),
        shards=tuple(shards),
        skipped={},
    )
    manifest.save(folder)
    return folder


if __name__ == "__main__":
    main()
