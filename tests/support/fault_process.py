"""A process of test_faults.py: ``fault_process.py SETTINGS.json`` trains, with a fault, and writes what came.

Settings: {"config": PretrainConfig's fields, "data": folder, "result": file, "faults": {...}}, the faults being

    "poison"  {"window": number, "in": "loss" | "gradient", "once": bool}: wherever the window goes through the network,
              its loss, or the gradient alone, is not a number; once: the first time only
    "signal"  {"rank": rank, "step": step, "number": signal}: sent by that rank to itself before the step, from 0
    "shard"   {"rank": rank, "step": step, "file": path}: deleted
    "memory"  {"windows": number, "ranks": [rank, ...]}: these ranks have too little for a larger micro-batch
    "device"  {"bytes": [number of each rank]}: the memory of this rank's device, for --batch_size auto
    "disk"    {"rank": rank, "step": step, "bytes": number}: from then on no file of that rank may become larger

RESULT.RANK holds how the rank ended, the losses by step as exact numbers, and every metric of its tracker.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config.training import PretrainConfig
from pipeline.distributed.process_group import init_distributed
from pipeline.distributed.signals import Interruptions, stop_on_signals
from pipeline.errors import RunStopped, UserError
from pipeline.training import step_guard
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker
from tests.support.small_memory import small_device, small_memory


def poison(trainer: Trainer, *, window: int, where: str, once: bool) -> None:
    """Make one window's loss or gradient not a number."""
    length = trainer.config.context_length
    ids = torch.from_numpy(trainer.train_stream.read(window * (length + 1), length).astype("int64"))
    left = [1 if once else 10**9]

    def spoil(_: object, arguments: tuple[Tensor, ...], loss: Tensor) -> Tensor:
        is_hit = bool((arguments[0] == ids).all(dim=1).any()) if arguments[0].shape[1] == length else False
        if not is_hit or not torch.is_grad_enabled() or left[0] == 0:
            return loss
        left[0] -= 1
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    trainer.model.register_forward_hook(spoil)


def before_step(trainer: Trainer, faults: dict[str, Any]) -> None:
    """Let the faults of this rank happen at the beginning of their steps."""
    take = trainer.train_step

    def faulty(step: int) -> Any:
        for name, fault in faults.items():
            if fault.get("step") == step and fault["rank"] == trainer.workers.rank:
                strike(name, fault)
        return take(step)

    trainer.train_step = faulty  # type: ignore[method-assign]


def strike(name: str, fault: dict[str, Any]) -> None:
    if name == "signal":
        os.kill(os.getpid(), fault["number"])
    elif name == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    else:
        Path(fault["file"]).unlink()


def train(settings: dict[str, Any]) -> tuple[str, MemoryTracker, int]:
    """How it ended, what was tracked, which rank this is."""
    config = PretrainConfig(**settings["config"])
    workers, tracker = init_distributed("cpu"), MemoryTracker()
    with stop_on_signals() as request:
        faults = dict(settings["faults"])
        if "device" in faults:
            small_device(faults.pop("device")["bytes"][workers.rank])
        trainer = Trainer(
            config,
            data=Path(settings["data"]),
            output=Path(config.output),
            workers=workers,
            tracker=tracker,
            interruptions=Interruptions(stop_requested=request),
        )
        if "patience" in faults:
            step_guard.PATIENCE_SECONDS = faults.pop("patience")["seconds"]
        if "poison" in faults:
            fault = faults.pop("poison")
            poison(trainer, window=fault["window"], where=fault["in"], once=fault["once"])
        if "memory" in faults:
            fault = faults.pop("memory")
            small_memory(fault["windows"], ranks=fault["ranks"])
        before_step(trainer, faults)
        try:
            trainer.run()
            return "done", tracker, workers.rank
        except RunStopped as stopped:
            return f"stopped: {stopped}", tracker, workers.rank
        except UserError as error:
            return f"error: {error}", tracker, workers.rank


def main() -> None:
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    end, tracker, rank = train(settings)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    losses = {step: loss.hex() for step, loss in tracker.metrics["train/loss"]}
    skipped = tracker.metrics["train/skipped_steps"]
    result = {"end": end, "losses": losses, "skipped": skipped, "status": tracker.status, "samples": tracker.samples}
    Path(f"{settings['result']}.{rank}").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main()
