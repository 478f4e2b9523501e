"""What a process needs around it for the same numbers to give the same bits on GPUs: settings of NCCL and cuBLAS.

They are read from the environment when the first communicator or the first cuBLAS handle is made, so they are set
before a process group is. What the user has set stays; ``broken_promises`` says where that breaks the promise.

Sources: NVIDIA/nccl issue 1497 (a sum inside the NVLink switch, NVLS, comes out differently from one call to the next;
NCCL_NVLS_ENABLE=0 cures it) and issue 2360 (it depends on what was allocated before); Megatron-LM's deterministic mode,
which demands an NCCL_ALGO that is not NVLS; torch's reproducibility notes for CUBLAS_WORKSPACE_CONFIG. Algorithm and
protocol are fixed because NCCL otherwise chooses them by size and topology, and each adds in an order of its own.
cuBLAS promises equal bits on the same GPU with such a workspace (its documentation, "Results Reproducibility"), also
where products are split and added up in bfloat16, so torch's allow_bf16_reduced_precision_reduction stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class _Setting:
    name: str
    value: str
    """Set where the user has set nothing."""
    also_fixed: tuple[str, ...] = ()
    """Other values that give the same bits at every start."""


_SETTINGS = (
    _Setting(name="NCCL_NVLS_ENABLE", value="0"),
    _Setting(name="NCCL_ALGO", value="Ring", also_fixed=("Tree",)),
    _Setting(name="NCCL_PROTO", value="Simple", also_fixed=("LL", "LL128")),
    _Setting(name="CUBLAS_WORKSPACE_CONFIG", value=":4096:8", also_fixed=(":16:8",)),
)


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set in this process what the user has not set. Call it before a process group is made and before CUDA starts."""
    for setting in _SETTINGS:
        environment.setdefault(setting.name, setting.value)


def broken_promises(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """A sentence for every setting in the environment under which a resumed run may differ in its last bits."""
    return [
        f"{setting.name} is set to {environment[setting.name]}, so a resumed run may differ in its last bits from one "
        f"that was not interrupted; unset it, or set it to {setting.value}, or give --deterministic off"
        for setting in _SETTINGS
        if environment.get(setting.name, setting.value).lower()
        not in {value.lower() for value in (setting.value, *setting.also_fixed)}
    ]
