"""A process of test_compiled_run.py: ``compiled_process.py SETTINGS.json`` trains and counts compilations.

Settings: {"config": PretrainConfig's fields, "data": folder, "whole": whether the model is one FSDP unit, "history":
file}. HISTORY.RANK gets {"counts": [[what was done, graphs compiled so far], ...], "graph_breaks": {reason: number},
"losses": [...], "val_loss": ...}. Graphs are not turned into machine code (backend aot_eager): what is compiled, and
when, is the same.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch._dynamo.utils import counters

from pipeline.config.training import PretrainConfig
from pipeline.distributed import fsdp
from pipeline.distributed.process_group import init_distributed
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker


def counted(trainer: Trainer) -> list[tuple[str, int]]:
    """A list that grows with every step, evaluation and other part of a run."""
    counts: list[tuple[str, int]] = []

    def counting(name: str, action: Any) -> Any:
        def act(*arguments: Any) -> Any:
            result = action(*arguments)
            counts.append((name, counters["stats"]["unique_graphs"]))
            return result

        return act

    trainer.train_step = counting("step", trainer.train_step)  # type: ignore[method-assign]
    trainer.evaluation.compile = counting("compile", trainer.evaluation.compile)  # type: ignore[method-assign]
    trainer.evaluation.run = counting("evaluation", trainer.evaluation.run)  # type: ignore[method-assign]
    return counts


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    if not settings["whole"]:
        fsdp._WHOLE_UNIT_PARAMETERS = 10
    config = PretrainConfig(**settings["config"])
    workers, tracker = init_distributed("cpu"), MemoryTracker()
    trainer = Trainer(config, data=Path(settings["data"]), output=Path(config.output), workers=workers, tracker=tracker)
    counts = counted(trainer)
    summary = trainer.run()
    losses = [loss for _, loss in tracker.metrics.get("train/loss", [])]
    history: dict[str, Any] = {"counts": counts, "graph_breaks": dict(counters["graph_break"])}
    history |= {"losses": losses, "val_loss": summary.val_loss}
    Path(f"{settings['history']}.{workers.rank}").write_text(json.dumps(history))
    workers.broadcast_int(0)
    os._exit(0)


if __name__ == "__main__":
    main()
