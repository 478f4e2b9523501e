"""Ranks and devices, and how the network is spread over them: FSDP2, mixed precision, compilation.

The network knows nothing of this file. A process belongs to a group when Ray Train or torchrun made one; alone it is
rank 0 of 1 and nothing is sharded.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.transformer import Transformer
from pipeline.errors import UserError

# Dense bf16 matrix products per second of one device, from the vendors' data sheets (without sparsity).
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among the training workers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def raise_together(self, error: UserError | None) -> None:
        """Raise on every rank if any rank has an error, so that none waits in the next collective for one that left."""
        failed = self.sum(torch.tensor([error is not None], dtype=torch.int64, device=self.device))
        if error is not None:
            raise error
        if failed.item():
            raise UserError("another worker could not go on; its message says why")

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(box, src=0)
        return int(box.item())


def join_workers(device: Literal["auto", "cpu", "cuda"]) -> Workers:
    """Find this process's place, starting the process group under torchrun.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU on this machine; use --device cpu or auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend_name(use_cuda))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not use_cuda:
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
        return Workers(rank=rank, world_size=world_size, device=torch.device("cpu"))
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return Workers(rank=rank, world_size=world_size, device=torch.device("cuda", index))


def backend_name(use_cuda: bool) -> str:
    """Collectives on both kinds of tensor: checkpoints gather on the CPU while the GPU trains."""
    return "cpu:gloo,cuda:nccl" if use_cuda else "gloo"


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """The type of matrix products. auto: bf16 where the GPU has it."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def parallelize(model: Transformer, workers: Workers, *, dtype: torch.dtype, compile_blocks: bool) -> Transformer:
    """Move, compile and shard ``model`` in place: each block its own FSDP unit, embedding and head the root's.

    Weights, gradients' reduction and the optimizer stay float32; ``dtype`` is that of the matrix products.
    """
    model.to(workers.device)
    if compile_blocks:
        for block in model.blocks:
            block.compile()
        model.loss.compile()  # uncompiled it passes several times over the float32 logits
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        # The root too: left gathered after an evaluation, it would not see weights loaded into its shards.
        fully_shard(model, mp_policy=policy, reshard_after_forward=True)
    return model


def set_gradient_sync(model: Transformer, enabled: bool) -> None:
    """Gradients are reduced over ranks once per step, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; the tensor itself where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


def peak_flops(workers: Workers, dtype: torch.dtype) -> float:
    """FLOP/s that all workers together can reach: the data sheet's for known GPUs, else measured.

    The measurement is a matrix product of 512 x 512 on all ranks at once for half a second, so that workers which
    share cores share the peak too.
    """
    if workers.device.type == "cuda":
        name = torch.cuda.get_device_name(workers.device)
        for key, flops in sorted(_PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
            if key in name:
                return flops * workers.world_size
    rate = torch.tensor([_measured_flops(workers, dtype)], dtype=torch.float64)
    return float(workers.sum(rate.to(workers.device)).item())


def _measured_flops(workers: Workers, dtype: torch.dtype, size: int = 512, seconds: float = 0.5) -> float:
    matrix = torch.randn(size, size, dtype=dtype, device=workers.device)
    (matrix @ matrix)[0, 0].item()  # starts the threads, or the kernel's library
    workers.agree(0)  # begin together
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (matrix @ matrix)[0, 0].item()  # waits for the device
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - start)
