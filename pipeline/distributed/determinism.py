"""Deterministic mode: settings of NCCL, cuBLAS and torch under which the same numbers give the same bits on GPUs.

NCCL and cuBLAS read theirs from the environment when the first communicator or the first handle is made, so they are
set before a process group is. What the user has set stays; ``nondeterministic_settings`` names what conflicts.

Sources: NVIDIA/nccl issue 1497 (a sum inside the NVLink switch, NVLS, comes out differently from one call to the next;
NCCL_NVLS_ENABLE=0 cures it) and issue 2360 (it depends on what was allocated before); Megatron-LM's deterministic mode,
which demands an NCCL_ALGO that is not NVLS; torch's reproducibility notes for CUBLAS_WORKSPACE_CONFIG. Algorithm and
protocol are fixed because NCCL otherwise chooses them by size and topology, and each adds in an order of its own.
cuBLAS promises equal bits on the same GPU with such a workspace (its documentation, "Results Reproducibility"), also
where products are split and added up in bfloat16, so torch's allow_bf16_reduced_precision_reduction stays as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping

import torch

_SETTINGS = {
    "NCCL_NVLS_ENABLE": ("0",),
    "NCCL_ALGO": ("Ring", "Tree"),
    "NCCL_PROTO": ("Simple", "LL", "LL128"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}
"""Values under which every start gives the same bits; the first is set if the user has set none."""


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not set; call it before a process group is made and before CUDA starts."""
    for name, (value, *_) in _SETTINGS.items():
        environment.setdefault(name, value)


def nondeterministic_settings(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """A sentence for every setting in the environment under which a resumed run may differ in its last bits."""
    return [
        f"{name} is set to {environment[name]}, so a resumed run may differ in its last bits from one "
        f"that was not interrupted; unset it, or set it to {values[0]}, or give --deterministic off"
        for name, values in _SETTINGS.items()
        if environment.get(name, values[0]).lower() not in {value.lower() for value in values}
    ]


@contextlib.contextmanager
def deterministic(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
    """A context in which operations on a GPU are deterministic, which an exact resume needs.

    Otherwise the backward pass of flash attention adds atomically, in any order, and cuDNN's attention has no
    deterministic form. The whole program cannot run so: sampling uses operations without a deterministic form.

    Args:
        enabled: if False (--deterministic off), torch chooses the kernels as usual.
    """
    if device.type != "cuda" or not enabled:
        yield
        return
    # Filling every new tensor only serves to find mistakes, and costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
