"""Stand-ins for a GPU whose memory is too small."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.training import largest_batch


def small_memory(largest: int, *, ranks: Collection[int]) -> None:
    """In this process a micro-batch of more than ``largest`` windows raises what a GPU's allocator raises."""
    forward = Transformer.forward

    def starved(self: Transformer, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and len(tokens) > largest and int(os.environ.get("RANK", "0")) in ranks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.")
        return forward(self, tokens, *args, **kwargs)

    patch.object(Transformer, "forward", starved).start()


class StandIn(largest_batch.CudaMemory):
    """A memory that takes what autograd keeps for backward, and gives nothing back before the peak is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit, self._peak = limit, 0

    def limit(self) -> int:
        return self._limit

    def reset_peak(self) -> None:
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
