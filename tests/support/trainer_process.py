"""A process of test_trainer.py: ``trainer_process.py SETTINGS.json`` trains and writes what happened.

Settings: {"config": PretrainConfig's fields, "data": [folder, ...], "stop_after": steps or null, "is_killed": whether
every rank then kills itself, whatever is being written, "history": file}.
Beside the history, HISTORY.RANK tells which windows every rank was fed: [[step, [[token, ...], ...]], ...].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config.training import PretrainConfig
from pipeline.dataset.batches import MicroBatch
from pipeline.distributed.process_group import init_distributed
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker


def recorded(trainer: Trainer) -> list[tuple[int, list[list[int]]]]:
    """A list that grows with every micro-batch the trainer takes: its step and its windows as tokens."""
    take, fed = trainer.loader.step, []

    def taking(step: int) -> Iterator[MicroBatch]:
        for batch in take(step):
            if batch.weight:  # else it is a copy, to join the others' collectives
                fed.append((step, torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).tolist()))
            yield batch

    trainer.loader.step = taking  # type: ignore[method-assign]
    return fed


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    config = PretrainConfig(**settings["config"])
    workers, tracker = init_distributed("cpu"), MemoryTracker()
    data = [Path(folder) for folder in settings["data"]]
    trainer = Trainer(config, data=data, output=Path(config.output), workers=workers, tracker=tracker)
    start_step, fed = trainer.start_step, recorded(trainer)
    if settings["stop_after"]:
        for step in range(start_step, settings["stop_after"]):
            trainer.advance(step)
        if settings.get("is_killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.writer.wait()
    else:
        trainer.run()
    if workers.is_rank_zero:
        losses = {step: loss.hex() for step, loss in tracker.metrics["train/loss"]}
        Path(settings["history"]).write_text(json.dumps({"start_step": start_step, "losses": losses}))
    Path(f"{settings['history']}.{workers.rank}").write_text(json.dumps(fed))
    workers.broadcast_int(0)
    os._exit(0)  # as abrupt as a kill: nothing is closed


if __name__ == "__main__":
    main()
