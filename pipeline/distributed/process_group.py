"""The process group of a run: the rank and the device of this process, and the few collectives that a run needs.

A process belongs to a group when Ray Train or torchrun made one; alone it is rank 0 of 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import determinism
from pipeline.errors import UserError

_TEXT_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a run, as one of them sees it: its rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place where there are several. Collective."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Raise on every rank the error of the lowest rank that has one, so that none waits for it. Collective.

        The sentence of each rank is cut after 2,048 bytes.
        """
        failed = self.sum(torch.tensor([error is not None], dtype=torch.int64, device=self.device))
        if not failed.item():
            return
        table = torch.zeros(self.world_size, _TEXT_BYTES, dtype=torch.uint8)
        if content := bytearray(str(error or "").encode()[:_TEXT_BYTES]):
            table[self.rank, : len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        rows = self.sum(table.to(self.device)).cpu().numpy()
        sentences = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]
        raise UserError(next(sentence for sentence in sentences if sentence)) from error

    def all_reduce_min(self, number: int) -> int:
        """The smallest integer of all ranks. Collective."""
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box.item())

    def broadcast_int(self, number: int) -> int:
        """Broadcast an integer from rank 0. Collective."""
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(box, src=0)
        return int(box.item())


def init_distributed(device: Literal["auto", "cpu", "cuda"], *, deterministic: bool = False) -> ProcessGroup:
    """Rank, world size and device of this process; under torchrun this also starts the process group.

    Args:
        deterministic: whether sums over ranks must give the same bits at every start, on GPUs too.

    Raises:
        UserError: --device cuda is given and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU on this machine; use --device cpu or auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if deterministic and use_cuda:  # variables of NCCL; a job that trains on the CPU may start other processes later
        determinism.set_environment()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend_name(use_cuda))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not use_cuda:
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
        return ProcessGroup(rank=rank, world_size=world_size, device=torch.device("cpu"))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by deterministic(), read when CUDA starts
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return ProcessGroup(rank=rank, world_size=world_size, device=torch.device("cuda", index))


def backend_name(use_cuda: bool) -> str:
    """The backend of torch.distributed; with GPUs one for tensors of each kind, as checkpoints gather on the CPU."""
    return "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
