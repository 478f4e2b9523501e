"""A process of test_trainer.py: ``torchrun trainer_process.py SETTINGS.json`` trains and writes what happened.

Settings: {"config": PretrainConfig's fields, "data": folder, "stop_after": steps or null, "history": file}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config import PretrainConfig
from pipeline.parallel import join_workers
from pipeline.tracking import MemoryTracker
from pipeline.trainer import Trainer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    config = PretrainConfig(**settings["config"])
    workers, tracker = join_workers("cpu"), MemoryTracker()
    trainer = Trainer(config, data=Path(settings["data"]), output=Path(config.output), workers=workers, tracker=tracker)
    start_step = trainer.start_step
    if settings["stop_after"]:
        for step in range(start_step, settings["stop_after"]):
            trainer._after_step(step + 1, trainer.train_step(step))
        trainer.writer.wait()
    else:
        trainer.run()
    if workers.is_first:
        losses = {step: loss.hex() for step, loss in tracker.metrics["train/loss"]}
        Path(settings["history"]).write_text(json.dumps({"start_step": start_step, "losses": losses}))
    workers.agree(0)
    os._exit(0)  # as abrupt as a kill: nothing is closed


if __name__ == "__main__":
    main()
