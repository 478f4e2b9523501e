"""Steps and seconds to the same val loss: --optimizer muon against adamw, both over the same learning rates.

    python benchmarks/optimizers.py --corpus FOLDER [--lr 0.001 0.002 0.004 0.008] [--steps 400] [--json FILE]

Trains a small network on the folder's parquet files (tokenizer learned from them too), once per optimizer and learning
rate, from the same weights on the same batches: warm-up, then a constant rate, so that a longer run is no other run.
The goal is the lowest val loss that AdamW reaches with its best rate. Seconds are those of the steps alone, Muon's
products included; CPU seconds too, which a neighbour's load changes least.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model.config import ModelConfig
from model.muon import Muon, muon_groups
from model.optimizer import AdamW, clip_grad_norm, parameter_groups
from model.transformer import Transformer, init_weights
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.hardware import compute_dtype
from pipeline.distributed.process_group import init_distributed
from pipeline.tokenizer.training import train_bpe

VAL_WINDOWS = 64


@dataclass
class Run:
    """One optimizer with one learning rate."""

    optimizer: str
    lr: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, val loss)."""
    step_seconds: float = 0.0
    """Mean over the steps but the first."""
    step_cpu_seconds: float = 0.0

    @property
    def final_loss(self) -> float:
        return self.losses[-1][1]

    def steps_to(self, goal: float) -> int | None:
        """Steps after which the val loss is at the goal or below."""
        return next((step for step, loss in self.losses if loss <= goal), None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every run trains on."""

    config: ModelConfig
    train: Tensor
    """(windows, T + 1) int64, in training order, wrapped around."""
    val: Tensor
    batch_size: int
    steps: int
    val_every: int


def main() -> None:
    arguments = parse()
    task = make_task(arguments)
    print(f"{task.config.num_parameters:,} parameters, {task.train.shape[0]:,} train windows", flush=True)
    runs = []
    for lr in arguments.lr:
        for name in ("adamw", "muon"):
            runs.append(train(Run(optimizer=name, lr=lr), task, arguments.device))
            print(f"{name:6} lr {lr:g}: val loss {runs[-1].final_loss:.4f}", flush=True)
    goal = min(run.final_loss for run in runs if run.optimizer == "adamw")
    print_table(runs, goal)
    if arguments.json:
        arguments.json.write_text(json.dumps({"goal": goal, "runs": [asdict(run) for run in runs]}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of parquet files with a column text")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--val_every", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16, help="windows of a step")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--megabytes", type=float, default=10, help="of text to train on")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_task(arguments: argparse.Namespace) -> Task:
    config = ModelConfig(
        vocab_size=arguments.vocab_size,
        context_length=128,
        num_layers=4,
        num_heads=4,
        d_model=arguments.d_model,
        d_ff=arguments.d_model * 11 // 4 // 8 * 8,
    )
    texts = read_texts(arguments.corpus, int(arguments.megabytes * 1e6))
    tokenizer = train_bpe(texts, arguments.vocab_size)
    ids = np.concatenate([np.array([tokenizer.eot_id, *tokenizer.encode(text)]) for text in texts])
    length = config.context_length + 1
    windows = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
    shuffled = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    return Task(
        config=config,
        train=shuffled[VAL_WINDOWS:],
        val=shuffled[:VAL_WINDOWS],
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        val_every=arguments.val_every,
    )


def read_texts(folder: Path, num_bytes: int) -> list[str]:
    texts: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
            texts.append(text)
            num_bytes -= len(text)
            if num_bytes < 0:
                return texts
    return texts


def train(run: Run, task: Task, device: str) -> Run:
    workers = init_distributed(device)  # type: ignore[arg-type]
    model = Transformer(task.config)
    init_weights(model, seed=0)
    parallelize(model, workers, dtype=compute_dtype("auto", workers.device), compile_blocks=False)
    if run.optimizer == "muon":
        optimizer: AdamW = Muon(muon_groups(model, model.blocks, 0.1), run.lr)
    else:
        optimizer = AdamW(parameter_groups(model, 0.1), run.lr)
    warmup_steps = max(1, task.steps // 20)
    start, cpu_start = time.perf_counter(), time.process_time()
    paused = cpu_paused = 0.0
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1.0, (step + 1) / warmup_steps)
        rows = torch.arange(step * task.batch_size, (step + 1) * task.batch_size) % len(task.train)
        batch = task.train[rows].to(workers.device)
        model(batch[:, :-1], batch[:, 1:]).backward()
        clip_grad_norm([p.grad for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % task.val_every == 0 or step + 1 == task.steps:
            before, cpu_before = time.perf_counter(), time.process_time()
            with torch.no_grad():
                val = task.val.to(workers.device)
                run.losses.append((step + 1, model(val[:, :-1], val[:, 1:]).item()))
            paused += time.perf_counter() - before
            cpu_paused += time.process_time() - cpu_before
    run.step_seconds = (time.perf_counter() - start - paused) / task.steps
    run.step_cpu_seconds = (time.process_time() - cpu_start - cpu_paused) / task.steps
    return run


def print_table(runs: list[Run], goal: float) -> None:
    print(f"\ngoal: AdamW's best val loss, {goal:.4f}")
    print(f"{'':8}{'lr':>8}{'val loss':>10}{'ms/step':>9}{'steps to goal':>15}{'seconds':>9}{'CPU s':>8}")
    for run in sorted(runs, key=lambda run: (run.optimizer, run.lr)):
        steps = run.steps_to(goal)
        reached = "-" if steps is None else f"{steps}"
        seconds = "-" if steps is None else f"{steps * run.step_seconds:.1f}"
        cpu = "-" if steps is None else f"{steps * run.step_cpu_seconds:.1f}"
        milliseconds = f"{1000 * run.step_seconds:.0f}"
        print(f"{run.optimizer:8}{run.lr:>8g}{run.final_loss:>10.4f}{milliseconds:>9}{reached:>15}{seconds:>9}{cpu:>8}")


if __name__ == "__main__":
    main()
