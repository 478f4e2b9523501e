"""Workers of test_out_of_memory.py, as Ray starts them: the memory of some takes micro-batches up to a size only.

Every start leaves a file start-RANK-... in the run's folder.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.cluster.workers import SharedFiles
from pipeline.distributed import signals
from pipeline.training import launch, trainer
from pipeline.training.launch import WorkerSettings
from pipeline.training.run_folder import RunSummary
from tests.support.small_memory import small_memory

LARGEST = 2
"""Windows that fit."""


def count_start(settings: WorkerSettings) -> None:
    (Path(settings.output) / f"start-{os.environ['RANK']}-{uuid.uuid4().hex}").touch()


def all_starved(settings: WorkerSettings, files: SharedFiles) -> RunSummary:
    count_start(settings)
    small_memory(LARGEST, ranks=(0, 1))
    return launch.pretrain_worker(settings, files)


def second_starved(settings: WorkerSettings, files: SharedFiles) -> RunSummary:
    """The first rank waits for the second in a collective, which fails."""
    count_start(settings)
    small_memory(LARGEST, ranks=(1,))
    return launch.pretrain_worker(settings, files)


def building_starved(settings: WorkerSettings, files: SharedFiles) -> RunSummary:
    """The second rank has no room for its part of the weights; the first waits for it in a collective."""
    count_start(settings)
    if os.environ["RANK"] == "1":
        trainer.parallelize = no_room
    return launch.pretrain_worker(settings, files)


def no_room(*_: Any, **__: Any) -> Transformer:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.")


def first_never_answers(settings: WorkerSettings, files: SharedFiles) -> RunSummary:
    """The first rank waits where nothing fails when the second has left, as over NCCL."""
    signals._ERROR_FILE_SECONDS = signals._GRACE_SECONDS = 0.5
    forward = Transformer.forward
    count_start(settings)
    small_memory(LARGEST, ranks=(1,))
    starved = Transformer.forward

    def waiting(self: Transformer, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and os.environ["RANK"] == "0":
            forward(self, tokens, *args, **kwargs)  # the second one waits for this rank's weights
            time.sleep(600)
        return starved(self, tokens, *args, **kwargs)

    patch.object(Transformer, "forward", waiting).start()
    return launch.pretrain_worker(settings, files)
