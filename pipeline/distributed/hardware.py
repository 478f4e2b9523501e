"""What a device can do: its peak FLOP/s, its number format for matrix products, the memory that is held."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Literal

import torch

from pipeline.distributed.process_group import ProcessGroup

# FLOP/s of dense bf16 matrix products that are added up in float32, of one device, by the name torch gives it. From
# NVIDIA's data sheets "H100", "H200", "A100", "L40S", "L4" and "HGX B200", most of which print the doubled rate "with
# sparsity", and for the RTX 4090 from the whitepaper "Ada GPU architecture", appendix A.
_PEAK_FLOPS = {
    r"B200": 2250e12,
    r"H200": 989.5e12,
    r"H200 NVL": 835.5e12,
    r"H100 \d+GB HBM3": 989.5e12,  # SXM
    r"H100 NVL": 835.5e12,
    r"H100 PCIe": 756.5e12,
    r"A100([- ](SXM4|PCIE|PCIe))?([- ]\d+GB)?( PCIe)?": 312e12,
    r"L40S": 362.05e12,
    r"L4": 121e12,
    r"GeForce RTX 4090": 165.2e12,
}


def compute_dtype(precision: Literal["auto", "bf16", "fp32", "float32"], device: torch.device) -> torch.dtype:
    """The number format of matrix products; auto is bf16 on a GPU that has it, and otherwise float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else torch.float32


def peak_flops(workers: ProcessGroup, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of all workers together by the data sheet of their GPU, the denominator of MFU.

    None if it is not known: on other GPUs or a part of one, for products in float32, and on a CPU, whose rate depends
    on clocks, on the size of the products and on other processes.
    """
    if workers.device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(workers.device).removeprefix("NVIDIA ")
    flops = next((flops for pattern, flops in _PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)
    return None if flops is None else flops * workers.world_size


def memory_gib(workers: ProcessGroup) -> float:
    """Memory that this process takes now, in GiB: of the GPU allocator, or resident memory on a CPU."""
    if workers.device.type == "cuda":
        return torch.cuda.memory_reserved(workers.device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def peak_memory_gib(workers: ProcessGroup) -> float:
    """Peak memory of this process in GiB: of the GPU allocator, or resident memory on a CPU."""
    if workers.device.type == "cuda":
        return torch.cuda.max_memory_allocated(workers.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB
