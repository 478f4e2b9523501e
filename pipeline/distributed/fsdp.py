"""Ranks and devices, and how the network is spread over them: FSDP2, mixed precision, compilation.

The network knows nothing of this file. A process belongs to a group when Ray Train or torchrun made one; alone it is
rank 0 of 1 and nothing is sharded.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.transformer import Transformer
from pipeline.distributed import determinism
from pipeline.errors import UserError

if TYPE_CHECKING:
    from model.kv_cache import KVCache

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

_TEXT_BYTES = 2048
_WHOLE_UNIT_PARAMETERS = 10**9
"""Up to this size a model is gathered as a whole: 2 GB of bfloat16 weights and 4 GB of float32 gradients a worker."""


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
        """Raise on every rank the error of the first that has one, so that none waits for a rank that left."""
        failed = self.sum(torch.tensor([error is not None], dtype=torch.int64, device=self.device))
        if not failed.item():
            return
        sentences = self.share_texts("" if error is None else str(error))
        raise UserError(next(sentence for sentence in sentences if sentence)) from error

    def share_texts(self, text: str) -> list[str]:
        """Every rank's text, by rank, cut after some 2,000 bytes. Collective."""
        table = torch.zeros(self.world_size, _TEXT_BYTES, dtype=torch.uint8)
        content = bytearray(text.encode()[:_TEXT_BYTES])
        if content:
            table[self.rank, : len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        rows = self.sum(table.to(self.device)).cpu().numpy()
        return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers, on every rank."""
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box.item())

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(box, src=0)
        return int(box.item())


def join_workers(device: Literal["auto", "cpu", "cuda"], *, deterministic: bool = False) -> Workers:
    """Find this process's place, starting the process group under torchrun.

    Args:
        deterministic: sums over ranks are to give the same bits at every start, on GPUs too.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU on this machine; use --device cpu or auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if deterministic:
        determinism.prepare()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend_name(use_cuda))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not use_cuda:
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
        return Workers(rank=rank, world_size=world_size, device=torch.device("cpu"))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by repeatable, read when CUDA starts
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
    """Move, compile and shard ``model`` in place; weights, gradients' reduction and the optimizer stay float32.

    Args:
        dtype: of the matrix products and of what flows between them.
        compile_blocks: compile the way from tokens to loss, in one piece where the model is one FSDP unit or none,
            else block by block. Applies to whole windows; other lengths (the end of a val set, generation) run as
            they are, because each would be compiled anew.
    """
    model.to(workers.device)
    whole = model.config.num_parameters <= _WHOLE_UNIT_PARAMETERS
    if compile_blocks and whole:
        _compile_whole(model)
    elif compile_blocks:
        for block in model.blocks:
            block.compile(dynamic=False)
        model.loss.compile(dynamic=False)
    if dist.is_initialized():
        _shard(model, workers, dtype, whole=whole)
    elif dtype != torch.float32:
        model.compute_dtype = dtype  # weights are cast where they are used
    return model


def _compile_whole(model: Transformer) -> None:
    plain, compiled = model.mean_loss, torch.compile(model.mean_loss, dynamic=False)

    def mean_loss(tokens: Tensor, targets: Tensor, cache: KVCache | None = None) -> Tensor:
        is_window = cache is None and tokens.shape[1] == model.config.context_length
        return compiled(tokens, targets) if is_window else plain(tokens, targets, cache)

    model.mean_loss = mean_loss  # type: ignore[method-assign]


def _shard(model: Transformer, workers: Workers, dtype: torch.dtype, *, whole: bool) -> None:
    """A small model is one FSDP unit, gathered once per step; of a large one each block is a unit of its own.

    One unit costs the overlap of communication and computing: for the recipe on four H100s 0.25 GB gathered and 0.5 GB
    reduced once per step, some 2 ms of 220. It saves two gatherings per micro-batch and compiles in one piece.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))  # else a machine's GPUs, with --device cpu too
    if not whole:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not whole)
    if whole:
        model.register_forward_hook(_reshard_after_inference)


def _reshard_after_inference(model: nn.Module, _: object, __: object) -> None:
    # Left gathered after an evaluation, the model would not see weights that are loaded into its shards.
    if not torch.is_grad_enabled() and isinstance(model, FSDPModule):
        model.reshard()


def set_gradient_sync(model: Transformer, enabled: bool) -> None:
    """Gradients are reduced and a model of one unit is given back once per step, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        if model.config.num_parameters <= _WHOLE_UNIT_PARAMETERS:
            model.set_reshard_after_backward(enabled)


@contextlib.contextmanager
def repeatable(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
    """Inside, the same numbers give the same bits on a GPU too, which an exact resume needs.

    Flash attention's backward otherwise adds atomically, in any order, and cuDNN's attention has no other way. Not for
    the whole program: drawing samples uses operations that have no such form.

    Args:
        enabled: False changes nothing: whatever kernels torch prefers are used (--deterministic off).
    """
    if device.type != "cuda" or not enabled:
        yield
        return
    # Not for every new tensor a pass that only finds mistakes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; the tensor itself where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


def peak_flops(workers: Workers, dtype: torch.dtype) -> float | None:
    """FLOP/s that all workers together can reach by the data sheet of their GPU, the denominator of MFU.

    None where it is not known: on another GPU or a part of one, for products in float32, and on a CPU, whose rate
    depends on clocks, on the size of the products and on who else uses its cores.
    """
    if workers.device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(workers.device).removeprefix("NVIDIA ")
    flops = next((flops for pattern, flops in _PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)
    return None if flops is None else flops * workers.world_size


def peak_memory_gib(workers: Workers) -> float:
    """The most this process held: the GPU allocator's peak, or resident memory."""
    if workers.device.type == "cuda":
        return torch.cuda.max_memory_allocated(workers.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB
