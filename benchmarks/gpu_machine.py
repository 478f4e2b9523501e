"""What machine this is, how fast it can be, and which attention kernel torch takes on it: part of benchmarks/gpu.py.

    python benchmarks/gpu_machine.py [--device cuda]

Two ceilings, one of arithmetic and one of memory, say what any other figure can be at most. On a CPU all of it runs
with small tensors, as a check that the command works.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import median_seconds
from benchmarks.results import Results, add_result_arguments
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.process_group import init_distributed
from pipeline.errors import UserError

PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "pyarrow", "safetensors")
ATTENTION_SHAPE = {"cuda": (32, 12, 1024, 64), "cpu": (1, 2, 64, 16)}
"""Windows, heads, time, head dim; on a GPU those of the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_result_arguments(parser)
    arguments = parser.parse_args()
    results = Results(arguments.jsonl, arguments.label)
    print_driver()
    try:
        device = init_distributed(arguments.device).device
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    looks: dict[str, Callable[[torch.device], dict[str, Any]]] = {
        "versions": versions,
        "attention priority": attention_priority,
        "attention": attention_times,
        "ceilings": ceilings,
    }
    for name, look in looks.items():
        with results.attempt(name):
            found = look(device)
            for key, value in found.items():
                print(f"{name}: {key}: {value}", flush=True)
            results.add(name, **found)
    raise SystemExit(1 if results.failures else 0)


def print_driver() -> None:
    """What nvidia-smi says; looking changes nothing on the card."""
    if shutil.which("nvidia-smi") is None:
        print("nvidia-smi is not installed here", flush=True)
        return
    fields = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,temperature.gpu"
    for command in (["nvidia-smi"], ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        print(result.stdout + result.stderr, flush=True)


def versions(device: torch.device) -> dict[str, Any]:
    """Of Python, the packages that the step needs, and the device."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpu cores": os.cpu_count()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def attention_priority(device: torch.device) -> dict[str, Any]:
    """The order in which torch tries its kernels, and the one that it takes, with deterministic mode on and off."""
    order = [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
    queries, keys, values = attention_inputs(device)
    chosen = {}
    for mode in ("on", "off"):
        with deterministic(device, enabled=mode == "on"):
            number = torch._fused_sdp_choice(queries, keys, values, is_causal=True)
        chosen[f"chosen, deterministic {mode}"] = SDPBackend(number).name
    return {"order": order, **chosen}


def attention_times(device: torch.device) -> dict[str, Any]:
    """Milliseconds of one layer's attention, forward and backward, by kernel, with deterministic mode on and off."""
    found: dict[str, Any] = {}
    kernels = [SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        kernels.append(SDPBackend.CUDNN_ATTENTION)
    for kernel in kernels:
        for mode in ("on", "off"):
            name = f"{kernel.name}, deterministic {mode}, ms"
            with deterministic(device, enabled=mode == "on"), sdpa_kernel(kernel):
                try:
                    found[name] = round(1000 * median_seconds(attention_step(device), device), 3)
                except RuntimeError as error:  # torch refuses a kernel that has no deterministic form
                    found[name] = f"refused: {error}"[:200]
    return found


def attention_inputs(device: torch.device) -> list[Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = ATTENTION_SHAPE[device.type]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def attention_step(device: torch.device) -> Callable[[], None]:
    inputs = attention_inputs(device)
    grad = torch.ones_like(inputs[0])

    def step() -> None:
        queries, keys, values = inputs
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        torch.autograd.grad(mixed, inputs, grad)

    return step


def ceilings(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a large matrix product of random numbers, and GB/s of a copy, bytes read and written."""
    on_gpu = device.type == "cuda"
    size, num_bytes = (8192, 2**31) if on_gpu else (256, 2**22)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_seconds = median_seconds(lambda: left @ right, device)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), device)
    return {
        f"TFLOP/s of {size}^3 in {str(dtype).removeprefix('torch.')}": round(2 * size**3 / product_seconds / 1e12, 3),
        "GB/s copied": round(2 * num_bytes / copy_seconds / 1e9, 1),
    }


if __name__ == "__main__":
    main()
