"""Training that waits where a test says so. Python runs this file at its start where PYTHONPATH names its folder.

A run waits before the step whose number is in the file FOLDER.hold beside its folder, until that file is gone. So a
test can kill something in the middle of a training, and no race decides whether the training is still there by then.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _hold(trainer_module: ModuleType) -> None:
    """Let every Trainer look for its file before each step."""
    trainer_class: Any = trainer_module.Trainer
    train_step = trainer_class.train_step

    def held_step(trainer: Any, step: int) -> Any:
        hold = Path(f"{trainer.output}.hold")
        while hold.exists() and hold.read_text() == str(step):
            time.sleep(0.02)
        return train_step(trainer, step)

    trainer_class.train_step = held_step


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the trainer's module as ever, and has it changed as soon as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "pipeline.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hold(module: ModuleType) -> None:
                execute(module)
                _hold(module)

            spec.loader.exec_module = execute_and_hold  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
