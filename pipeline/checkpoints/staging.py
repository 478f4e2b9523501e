"""A training state copied to where training does not change it: what a checkpoint is written from, in the background.

The memory is got once and used for every checkpoint of a run; beside a GPU it is pinned, which the device copies to by
itself. Floor of the copy: bytes / bandwidth. The recipe's weights and two moments are 1.48 GB of float32; a rank of
four has 0.37 GB of it, some 15 ms over PCIe 4 x16 (25 GB/s) and 7 ms over PCIe 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pipeline.distributed.fsdp import local_part

_FILE_BYTES = 16 << 20


class StagedState:
    """Memory for the parts of a state that this rank has. Made on all ranks together.

    Args:
        state: names and tensors, sharded or whole.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._shapes = _shapes(state)
        self._pinned = any(tensor.is_cuda for tensor in state.values())
        with torch.no_grad():
            locals_ = {name: local_part(tensor) for name, tensor in state.items()}
            self._parts = {
                name: torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pinned)
                for name, part in locals_.items()
            }
            self.state: dict[str, Tensor] = {}
            """The copy, sharded as the original is."""
            meshes: dict[DeviceMesh, DeviceMesh] = {}
            for name, tensor in state.items():
                self.state[name] = _like(tensor, self._parts[name], meshes)
        self.file_of = _divide(state)

    def touch(self) -> None:
        """Have the system hand out the memory now, not in the middle of the first copy. What is in it is lost."""
        if not self._pinned:  # pinned memory is there from the start
            for part in self._parts.values():
                part.zero_()

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether ``state`` has the tensors that the memory was got for."""
        return _shapes(state) == self._shapes

    def copy(self, state: Mapping[str, Tensor]) -> None:
        """Copy this rank's parts; returns when ``state`` may change."""
        with torch.no_grad():
            sources = [local_part(tensor) for tensor in state.values()]
            torch._foreach_copy_([self._parts[name] for name in state], sources, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()


def _shapes(state: Mapping[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]


def _like(tensor: Tensor, part: Tensor, meshes: dict[DeviceMesh, DeviceMesh]) -> Tensor:
    """``part`` as this rank's part of a tensor that is laid out as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return part
    mesh = tensor.device_mesh
    if mesh not in meshes:  # a tensor of a mesh of GPUs would be moved there
        meshes[mesh] = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", (mesh.size(),))
    return DTensor.from_local(
        part, meshes[mesh], tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _divide(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor -> number of the file it goes to, from 1, the same on all ranks; a file is small or has one tensor.

    safetensors makes a file in memory and keeps every other thread of the process from running meanwhile: 0.22 s for
    370 MB in one file. Training loses that, a step of four H100s, unless the file is small.
    """
    found: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in state.items():
        shards = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
        num_bytes = math.ceil(tensor.numel() * tensor.element_size() / shards)
        if filled and filled + num_bytes > _FILE_BYTES:
            number, filled = number + 1, 0
        found[name], filled = number, filled + num_bytes
    return found
