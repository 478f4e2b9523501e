"""From tuned AdamW with a cosine to configs/fastest.yaml, one change at a time, at three sizes of network.

    python benchmarks/recipes.py --corpus ../shared/corpus --results FILE.jsonl [--sizes 1M 4M 16M] [--report FOLDER]

Every run trains a network on the folder's text from its start to the end of its own schedule: its loss counts, and
losses on the way do not, because a rate that has not fallen yet hides what was learnt. So what a recipe needs to reach
AdamW's best val loss is read off whole runs of fewer steps. AdamW and Muon are tuned over rates first; each change then
keeps all those before it. The settings of the changes are those of the presets.

A run is a line of the results; the same command again goes on with those that are missing. One thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch counts the cores
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from torch import Tensor

from benchmarks.optimizers import read_texts
from benchmarks.recipes_report import write_report
from model.optimizer import clip_grad_norm
from model.transformer import Transformer, init_weights
from pipeline.config.command_line import load_preset
from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.tokenizer.training import train_bpe
from pipeline.training.optimizer import build_optimizer, learning_rate

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))
CONTEXT_LENGTH = 128
VAL_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, and how many runs of it there are."""

    shape: dict[str, int]
    steps: int
    rates: dict[str, tuple[float, ...]]
    """Optimizer -> rates to try."""
    changes: tuple[str, ...]
    """Of CHANGES, those that get a run."""
    shorter: tuple[tuple[str, float], ...]
    """Change, and the share of the steps of a whole run of it."""
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    size: str
    recipe: str
    lr: float
    steps: int
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(kw_only=True)
class Run:
    """A job and what it came to: a line of the results."""

    job: Job
    parameters: int
    tokens_per_step: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, val loss)."""
    step_cpu_seconds: float = 0.0

    @property
    def final_loss(self) -> float:
        return self.losses[-1][1]


CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "muon": ("fast", ("optimizer",)),
    "trapezoid": ("fast", ("schedule", "warmup_steps", "decay_fraction", "min_lr_fraction")),
    "zero projections": ("fast", ("zero_init_projections",)),
    "QK-norm": ("fast", ("qk_norm",)),
    "fast": ("fast", ("embedding_lr", "weight_decay")),
    "long decay": ("fastest", ("decay_fraction",)),
    "untied": ("fastest", ("tie_embeddings", "zero_init_output")),
    "rates by kind": (
        "fastest",
        ("embedding_lr", "embedding_init_std", "output_lr", "vector_lr", "init_std"),
    ),
    "betas, decay": ("fastest", ("beta1", "beta2", "eps", "weight_decay", "embedding_weight_decay")),
    "fastest": ("fastest", ("muon_iterations", "muon_coefficients", "muon_momentum")),
}
"""Name -> the preset whose values a change takes, and the names of these settings; each keeps the changes before it."""

_ALL = tuple(CHANGES)[1:]
_ADAMW, _MUON = (1e-3, 2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 1.6e-2, 3.2e-2)
_SHORTER = tuple((change, share) for share in (1 / 3, 1 / 2) for change in ("muon", "fast", "fastest"))
SHORTER_RATES = (1, 2)
"""Shorter runs are tuned too: at these multiples of the best rate of whole runs."""
SIZES = {
    "tiny": Size(
        shape={"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 32},
        steps=4,
        rates={"adamw": (1e-3, 2e-3), "muon": (4e-3, 8e-3)},
        changes=_ALL,
        shorter=(("fastest", 0.5),),
        seeds=2,
    ),
    "1M": Size(
        shape={"num_layers": 3, "num_heads": 4, "d_model": 128, "d_ff": 352},
        steps=160,
        rates={"adamw": _ADAMW, "muon": _MUON},
        changes=_ALL,
        shorter=_SHORTER,
        seeds=3,
    ),
    "4M": Size(
        shape={"num_layers": 4, "num_heads": 4, "d_model": 256, "d_ff": 704},
        steps=100,
        rates={"adamw": (5e-4, *_ADAMW), "muon": (2e-3, *_MUON)},
        changes=_ALL,
        shorter=_SHORTER,
    ),
    "16M": Size(
        shape={"num_layers": 8, "num_heads": 6, "d_model": 384, "d_ff": 1024},
        steps=100,
        rates={"adamw": (5e-4, *_ADAMW[:3]), "muon": (2e-3, *_MUON[:3])},
        changes=("fast", "fastest"),
        shorter=_SHORTER,
    ),
}
"""Shapes with a vocabulary of 4,096."""


def main() -> None:
    arguments = parse()
    runs = read_results(arguments.results)
    task = None
    for job in itertools.chain.from_iterable(jobs(size, runs) for size in arguments.sizes):
        if job.key in runs:
            continue
        task = task or Task(arguments)
        run = runs[job.key] = task.train(job)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(
            f"{time.strftime('%H:%M:%S')} {job.size:4} {job.recipe:16} lr {job.lr:g} seed {job.seed} "
            f"{job.steps:4} steps: {run.final_loss:.4f}, {run.step_cpu_seconds:.3f} CPU s a step",
            flush=True,
        )
    if arguments.report:
        write_report(arguments.report, [asdict(run) for run in runs.values()], ("adamw", *CHANGES))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of parquet files with a column text")
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines, one a run; runs in it are not repeated"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1M", "4M", "16M"])
    parser.add_argument("--report", type=Path, help="a folder for the tables and the picture")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text, from which the tokenizer learns too")
    parser.add_argument("--tokens_per_step", type=int, default=512)
    return parser.parse_args()


def read_results(path: Path) -> dict[str, Run]:
    """Key of its job -> each run of the file."""
    runs: dict[str, Run] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values = json.loads(line)
        run = Run(**(values | {"job": Job(**values["job"]), "losses": [tuple(point) for point in values["losses"]]}))
        runs[run.job.key] = run
    return runs


def jobs(name: str, runs: dict[str, Run]) -> Iterator[Job]:
    """The runs of a size in order; the best rates are known when those before are done."""
    size = SIZES[name]
    for optimizer in size.rates:
        yield from rate_jobs(name, optimizer)
    for change, share in size.shorter:
        for factor in SHORTER_RATES:
            lr = factor * best_rate(name, "muon", runs)
            yield Job(size=name, recipe=change, lr=lr, steps=round(size.steps * share))
    for change in size.changes:
        yield Job(size=name, recipe=change, lr=best_rate(name, "muon", runs), steps=size.steps)
    for seed in range(1, size.seeds):
        for recipe in ("adamw", "muon", "fast", "fastest"):
            lr = best_rate(name, "adamw" if recipe == "adamw" else "muon", runs)
            yield Job(size=name, recipe=recipe, lr=lr, steps=size.steps, seed=seed)


def rate_jobs(name: str, optimizer: str) -> list[Job]:
    size = SIZES[name]
    return [Job(size=name, recipe=optimizer, lr=lr, steps=size.steps) for lr in size.rates[optimizer]]


def best_rate(name: str, optimizer: str, runs: dict[str, Run]) -> float:
    return min(rate_jobs(name, optimizer), key=lambda job: runs[job.key].final_loss).lr


@functools.cache
def preset_values(name: str) -> dict[str, Any]:
    return load_preset(ROOT / f"configs/{name}.yaml", "pretrain", PretrainConfig)


def settings(recipe: str, lr: float) -> dict[str, Any]:
    """What a recipe sets: all changes up to it, with the presets' values and this rate for the blocks' matrices."""
    values: dict[str, Any] = {"lr": lr}
    if recipe == "adamw":
        return values
    for change, (preset, names) in CHANGES.items():
        given = preset_values(preset)
        values |= {name: given[name] for name in names}
        if change == "fast":  # a multiple of the rate, which is tuned here
            values["embedding_lr"] = lr * given["embedding_lr"] / given["lr"]
        if change == recipe:
            break
    if "muon_coefficients" in values:
        values["muon_coefficients"] = tuple(values["muon_coefficients"])
    return values


class Task:
    """Text, cut into windows: what all runs train on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.vocab_size, self.tokens_per_step = arguments.vocab_size, arguments.tokens_per_step
        torch.set_num_threads(1)
        texts = read_texts(arguments.corpus, int(arguments.megabytes * 1e6))
        tokenizer = train_bpe(texts, arguments.vocab_size)
        ids = np.concatenate([np.array([tokenizer.eot_id, *tokenizer.encode(text)]) for text in texts])
        length = CONTEXT_LENGTH + 1
        windows = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
        held_out = min(VAL_WINDOWS, len(windows) // 4)
        self.val, self.train_windows = windows[-held_out:], windows[:-held_out]

    def config(self, job: Job) -> PretrainConfig:
        """The settings of a run, as jobs/pretrain.py would have them."""
        values: dict[str, Any] = SIZES[job.size].shape | settings(job.recipe, job.lr)
        return PretrainConfig(
            **values,
            context_length=CONTEXT_LENGTH,
            train_steps=job.steps,
            tokens_per_step=self.tokens_per_step,
            batch_size=self.tokens_per_step // CONTEXT_LENGTH,
            num_workers=1,
            seed=job.seed,
            device="cpu",
        )

    def train(self, job: Job) -> Run:
        config = self.config(job)
        model = Transformer(config.model_config(self.vocab_size))
        init_weights(model, config.seed, config.init)
        optimizer = build_optimizer(model, config, ALONE)
        run = Run(job=job, parameters=model.config.num_parameters, tokens_per_step=self.tokens_per_step)
        order = torch.randperm(len(self.train_windows), generator=torch.Generator().manual_seed(config.seed))
        cpu = 0.0
        for step in range(config.train_steps):
            start = time.process_time()
            rows = torch.arange(step * config.windows_per_step, (step + 1) * config.windows_per_step) % len(order)
            self._step(config, model, optimizer, self.train_windows[order[rows]], learning_rate(config, step))
            cpu += time.process_time() - start
            if (step + 1) % max(1, config.train_steps // 3) == 0 or step + 1 == config.train_steps:
                run.losses.append((step + 1, self._val_loss(model)))
        return replace(run, step_cpu_seconds=cpu / config.train_steps)

    @staticmethod
    def _step(config: PretrainConfig, model: Transformer, optimizer: Any, batch: Tensor, rate: float) -> None:
        """What Trainer.train_step does in one process."""
        model(batch[:, :-1], batch[:, 1:]).backward()
        clip_grad_norm([p.grad for p in model.parameters() if p.grad is not None], config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()

    def _val_loss(self, model: Transformer) -> float:
        with torch.no_grad():
            parts = [model(part[:, :-1], part[:, 1:]) * len(part) for part in self.val.split(16)]
        return float(sum(parts) / len(self.val))


if __name__ == "__main__":
    main()
