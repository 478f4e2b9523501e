"""Timing on a device, and what has to be forgotten between two things that are timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def forget_compiled() -> None:
    """Frees what compiled programs hold; the next size is compiled for itself, not as one program for any size."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Returns when the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median of ``repeats`` calls, each timed by itself until the device is done, after three that do not count."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
