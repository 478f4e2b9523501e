"""Where the time of a step goes: torch.profiler's events sorted into classes.

On a GPU the kernels are counted, each in the class of the operation that launched it, and what is left of the step is
"gaps": time in which the GPU had nothing to do. On a CPU the operations' own time is counted, "gaps" is Python and the
autograd engine.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CLASSES = ("matrix products", "attention", "loss", "norm and element-wise", "optimizer", "gaps")
_MATRIX = re.compile(
    r"(^|::|_)(mm|addmm|bmm|baddbmm|matmul|linear)\b|gemm|cutlass|nvjet|xmma|wgmma|splitk", re.IGNORECASE
)
_ATTENTION = re.compile(r"flash|fmha|scaled_dot|sdpa|attention|cudnn_generated", re.IGNORECASE)
# What only a cross-entropy does; ours, fused by a compiler, is named after its masked_fill and amax.
_LOSS = re.compile(r"softmax|nll|cross_entropy|logsumexp|amax|masked_fill|masked_scatter", re.IGNORECASE)
_OPTIMIZER = re.compile(r"adam|foreach|multi_tensor|clip_grad|lerp|addcdiv|addcmul|vector_norm", re.IGNORECASE)


def profile_step(step: Callable[[], Any], device: torch.device, vocab_size: int) -> dict[str, float]:
    """Seconds of one step per class of CLASSES, and "step", the whole."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    _wait(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        _wait(device)
        seconds = time.perf_counter() - start
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = event.self_cpu_time_total if device.type == "cpu" else sum(kernel.duration for kernel in event.kernels)
        if own > 0 and not _is_container(event.name):
            totals[_class_of(event, vocab_size)] += own / 1e6
    totals["gaps"] = max(0.0, seconds - sum(totals.values()))
    return {name: totals[name] for name in CLASSES} | {"step": seconds}


def _class_of(event: Any, vocab_size: int) -> str:
    names = [event.name, *(kernel.name for kernel in event.kernels)]
    if _in_optimizer(event) or _OPTIMIZER.search(event.name):
        return "optimizer"
    if any(_ATTENTION.search(name) for name in names):
        return "attention"
    if any(_MATRIX.search(name) for name in names):
        return "matrix products"
    if any(_LOSS.search(name) for name in names) or _is_over_vocabulary(event, vocab_size):
        return "loss"
    return "norm and element-wise"


def _is_container(name: str) -> bool:
    """Ranges whose own time is Python's, and calls that wait."""
    ranges = ("Optimizer.", "ProfilerStep", "Torch-Compiled Region", "## Call", "autograd::engine")
    return name.startswith((*ranges, "cuda"))


def _in_optimizer(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("Optimizer.step"):
            return True
        event = event.cpu_parent
    return False


def _is_over_vocabulary(event: Any, vocab_size: int) -> bool:
    """Whether an operand is (rows, vocabulary), that is, logits or something of their shape."""
    shapes = [shape for shape in event.input_shapes or [] if isinstance(shape, list)]
    return any(len(shape) >= 2 and shape[-1] >= vocab_size for shape in shapes)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
