"""A training state copied to where training does not change it: what a checkpoint is written from, in the background.

The memory is got once and used for every checkpoint of a run; beside a GPU it is pinned, which the device copies to by
itself, and shared by the tensors: torch rounds each pinned allocation up to a power of two, 2.3 GB for the recipe's
weights and two moments, which are 1.48 GB of float32. Floor of the copy: bytes / bandwidth. A rank of four has 0.37 GB,
some 15 ms over PCIe 4 x16 (25 GB/s) and 7 ms over PCIe 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pipeline.distributed.fsdp import local_part

_FILE_BYTES = 16 << 20
_ALIGNMENT = 64  # bytes; of any element's type, and of a cache line


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
            empty = pinned_like if self._pinned else empty_like
            self._parts = dict(zip(locals_, empty(list(locals_.values())), strict=True))
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


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Memory on the CPU for each tensor."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]


def _pinned_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def pinned_like(tensors: Sequence[Tensor], allocate: Callable[[int], Tensor] = _pinned_bytes) -> list[Tensor]:
    """Pinned memory for each tensor, several in one allocation.

    Each has a storage of its own size, as if it were alone: torch.distributed.checkpoint would copy a part of a larger
    one before it writes it. The storages keep the blocks alive.

    Args:
        allocate: from a number of bytes to that much memory, (bytes,) uint8.
    """
    places, block_bytes = pack([tensor.numel() * tensor.element_size() for tensor in tensors])
    blocks = [allocate(count).numpy() for count in block_bytes]
    found = []
    for tensor, (block, start) in zip(tensors, places, strict=True):
        if not tensor.numel():
            found.append(torch.empty(tensor.shape, dtype=tensor.dtype))
            continue
        part = torch.frombuffer(blocks[block], dtype=tensor.dtype, count=tensor.numel(), offset=start)
        found.append(part.view(tensor.shape))
    return found


def pack(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Divide parts of ``sizes`` bytes among blocks whose sizes are powers of two, with little left over.

    The largest part first, each into the first block with room. A new block is the largest power of two that the rest
    fills, or the smallest that holds the part.

    Returns:
        For every part its block and where it begins there, in bytes; and the size of every block in bytes.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    block_bytes: list[int] = []
    filled: list[int] = []
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    rest = sum(padded)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = padded[index]
        fitting = (b for b, count in enumerate(block_bytes) if filled[b] + size <= count)
        block = next(fitting, len(block_bytes))
        if block == len(block_bytes):
            block_bytes.append(max(1 << (size - 1).bit_length(), 1 << (rest.bit_length() - 1)) if size else 0)
            filled.append(0)
        places[index] = block, filled[block]
        filled[block] += size
        rest -= size
    return places, block_bytes


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
