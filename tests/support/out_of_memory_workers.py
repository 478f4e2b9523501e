"""Workers of test_out_of_memory.py, as Ray starts them: the memory of some takes micro-batches up to a size only.

Every start leaves a file start-RANK-... in the run's folder.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.distributed import signals
from pipeline.training import largest_batch, launch

LARGEST = 2
"""Windows that fit."""


def small_memory(largest: int, *, ranks: Collection[int]) -> None:
    """In this process a micro-batch of more than ``largest`` windows raises what a GPU's allocator raises."""
    forward = Transformer.forward

    def starved(self: Transformer, tokens: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and len(tokens) > largest and int(os.environ.get("RANK", "0")) in ranks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.")
        return forward(self, tokens, *args)

    Transformer.forward = starved  # type: ignore[method-assign]


class StandIn:
    """A memory that takes what autograd keeps for backward, and gives nothing back before the peak is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit, self._peak = limit, 0

    def limit(self) -> int:
        return self._limit

    def forget_peak(self) -> None:
        self._peak = 0

    def peak(self) -> int:
        return self._peak

    def keep(self, tensor: Tensor) -> Tensor:
        self._peak += tensor.nbytes
        return tensor


def small_device(limit: int) -> None:
    """From now on this process has a device with a memory of so many bytes."""
    device = StandIn(limit)
    largest_batch.device_memory = lambda _: device  # type: ignore[assignment]
    torch.autograd.graph.saved_tensors_hooks(device.keep, lambda tensor: tensor).__enter__()


def count_start(settings: dict[str, Any]) -> None:
    (Path(settings["output"]) / f"start-{os.environ['RANK']}-{uuid.uuid4().hex}").touch()


def all_starved(settings: dict[str, Any]) -> dict[str, Any]:
    count_start(settings)
    small_memory(LARGEST, ranks=(0, 1))
    return launch.pretrain_worker(settings)


def second_starved(settings: dict[str, Any]) -> dict[str, Any]:
    """The first rank waits for the second in a collective, which fails."""
    count_start(settings)
    small_memory(LARGEST, ranks=(1,))
    return launch.pretrain_worker(settings)


def first_never_answers(settings: dict[str, Any]) -> dict[str, Any]:
    """The first rank waits where nothing fails when the second has left, as over NCCL."""
    signals._NOTE_SECONDS = signals._GRACE_SECONDS = 0.5
    forward = Transformer.forward
    count_start(settings)
    small_memory(LARGEST, ranks=(1,))
    starved = Transformer.forward

    def waiting(self: Transformer, tokens: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and os.environ["RANK"] == "0":
            forward(self, tokens, *args)  # the second one waits for this rank's weights
            time.sleep(600)
        return starved(self, tokens, *args)

    Transformer.forward = waiting  # type: ignore[method-assign]
    return launch.pretrain_worker(settings)
