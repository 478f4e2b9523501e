"""Every path of the training step on this device against float32 without kernels of anybody: part of benchmarks/gpu.py.

    python benchmarks/gpu_correctness.py [--preset tiny] [--compiled_layers 2] [--jsonl FILE]

One line a check, as soon as it is known, the cheap ones first: what needs no compiler, then what is compiled, with few
layers, since a layer's code is the same in each and compiling takes its time by the layer. A check that raises fails,
and the others go on. Ends with 1 if one fails. On a CPU the same checks run, save those of CUDA's own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.results import Results, add_result_arguments
from benchmarks.train_step_models import PRESETS
from model import loss
from model.config import ModelConfig
from model.layers import sum_rows
from model.muon import Muon, muon_groups, orthogonalize
from model.optimizer import AdamW, clip_grad_norm, parameter_groups
from model.transformer import Transformer, init_weights
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.process_group import ProcessGroup, init_distributed

WINDOWS = 4
FLOAT32_ERROR, BFLOAT16_ERROR = 1e-4, 1e-1
"""Largest distance of a gradient from the reference, over the reference's norm: rounding of float32 sums of some 10^5
terms in another order; of bfloat16's 8 bits (0.4 %) in each of some hundred operations one after another. A wrong
formula is off by about 1."""

Check = tuple[str, Callable[[], float], float]
"""Name, what measures it, and the most that is allowed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="124M")
    parser.add_argument("--compiled_layers", type=int, default=2, help="layers of the networks that are compiled")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_result_arguments(parser)
    arguments = parser.parse_args()
    workers = init_distributed(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = PRESETS[arguments.preset]
    results = Results(arguments.jsonl, arguments.label)
    failed = 0
    for name, measure, allowed in checks(config, arguments.compiled_layers, workers):
        measured = float("nan")
        with results.attempt(name):
            measured = measure()
        good = measured <= allowed
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {measured:.2e}, allowed {allowed:.0e}", flush=True)
        results.add("check", name=name, good=good, measured=measured, allowed=allowed)
    raise SystemExit(1 if failed else 0)


def checks(config: ModelConfig, compiled_layers: int, workers: ProcessGroup) -> Iterator[Check]:
    """What takes least time first."""
    few = dataclasses.replace(config, num_layers=compiled_layers)
    yield from part_checks(config, workers)
    yield from network_checks(config, workers, compiled=False)
    yield ("bfloat16 plain step repeated, other bits", partial(repeats_differ, config, workers, False), 0)
    yield ("AdamW, compiled, ten steps against torch's", partial(adamw_distance, workers, True), 1e-5)
    yield ("bfloat16 compiled step repeated, other bits", partial(repeats_differ, few, workers, True), 0)
    if workers.device.type == "cuda":
        for name in ("adamw", "muon"):
            yield (f"compiled steps, {name}, that wait for the device", partial(waits, few, workers, name), 0)
    yield from network_checks(few, workers, compiled=True)


def network_checks(config: ModelConfig, workers: ProcessGroup, *, compiled: bool) -> Iterator[Check]:
    """Loss and gradients of the whole network for every type; uncompiled, for every attention kernel too."""
    reference: list[Tensor] = []

    def error(dtype: torch.dtype, kernel: SDPBackend | None = None) -> float:
        if not reference:
            with sdpa_kernel(SDPBackend.MATH):
                reference.extend(gradients(make_model(config, workers, torch.float32, compiled=False), workers))
        model = make_model(config, workers, dtype, compiled)
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
            return distance(gradients(model, workers), reference)

    for dtype, allowed in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, BFLOAT16_ERROR)):
        name = f"network, {str(dtype).removeprefix('torch.')}"
        what = "compiled" if compiled else "plain"
        yield (f"{name} {what}", partial(error, dtype), allowed)
        for kernel in [] if compiled else attention_kernels(workers, dtype):
            yield (f"{name}, {kernel.name}", partial(error, dtype, kernel), allowed)


def attention_kernels(workers: ProcessGroup, dtype: torch.dtype) -> list[SDPBackend]:
    if workers.device.type != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if dtype == torch.float32:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def part_checks(config: ModelConfig, workers: ProcessGroup) -> Iterator[Check]:
    """The parts with a form of their own on this device."""
    yield ("sum of embedding gradients", partial(sums_differ, config, workers), 1e-6)
    yield ("Muon's polynomial in bfloat16", partial(polynomial_differs, config, workers), 0.1)
    yield ("AdamW, plain, ten steps against torch's", partial(adamw_distance, workers, False), 1e-5)
    yield ("chunked loss", partial(chunks_differ, config, workers), FLOAT32_ERROR)


def sums_differ(config: ModelConfig, workers: ProcessGroup) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, config.d_model, generator=generator)
    ids = torch.randint(0, 50, (2048,), generator=generator)
    exact = torch.zeros(config.vocab_size, config.d_model, dtype=torch.float64).index_add_(0, ids, rows.double())
    return relative(sum_rows(rows.to(workers.device), ids.to(workers.device), config.vocab_size), exact)


def polynomial_differs(config: ModelConfig, workers: ProcessGroup) -> float:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, config.d_model, config.d_ff, generator=generator)
    return relative(orthogonalize(matrix.to(workers.device)), orthogonalize(matrix.double(), torch.float64))


def make_model(config: ModelConfig, workers: ProcessGroup, dtype: torch.dtype, compiled: bool) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed=0)
    return parallelize(model, workers, dtype=dtype, compile_blocks=compiled)


def batch_of(config: ModelConfig, workers: ProcessGroup) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (WINDOWS, config.context_length + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(workers.device), tokens[:, 1:].contiguous().to(workers.device)


def gradients(model: Transformer, workers: ProcessGroup) -> list[Tensor]:
    """Of two micro-batches added up, and the loss."""
    inputs, targets = batch_of(model.config, workers)
    total = torch.zeros((), device=workers.device)
    for part in (slice(0, WINDOWS // 2), slice(WINDOWS // 2, WINDOWS)):
        value = model(inputs[part], targets[part]) * 0.5
        value.backward()
        total += value.detach()
    return [total, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    """The largest over all tensors."""
    return max(relative(a, b) for a, b in zip(found, reference, strict=True))


def relative(found: Tensor, reference: Tensor) -> float:
    exact = reference.double().cpu()
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def chunks_differ(config: ModelConfig, workers: ProcessGroup) -> float:
    kind = workers.device.type
    before, results = loss.CHUNK_BYTES[kind], []
    rows = WINDOWS // 2 * config.context_length
    for num_bytes in (2**40, 4 * config.padded_vocab_size * rows // 5):
        loss.CHUNK_BYTES[kind] = num_bytes
        results.append(gradients(make_model(config, workers, torch.float32, compiled=False), workers))
    loss.CHUNK_BYTES[kind] = before
    return distance(*results)


def adamw_distance(workers: ProcessGroup, compiled: bool) -> float:
    def run(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(1000, 300), (700,), (64, 64)]
        params = [torch.randn(shape, generator=generator).to(workers.device).requires_grad_() for shape in shapes]
        optimizer = make(params)
        for _ in range(10):
            for parameter in params:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(workers.device)
            optimizer.step()
        return [parameter.detach() for parameter in params]

    ours = run(lambda params: AdamW(params, 1e-2, compile=compiled))
    theirs = run(lambda params: torch.optim.AdamW(params, 1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=True))
    return distance(ours, theirs)


def steps_of(config: ModelConfig, workers: ProcessGroup, compiled: bool, name: str = "adamw") -> Callable[[], Tensor]:
    model = make_model(config, workers, torch.bfloat16, compiled)
    groups = muon_groups(model, model.blocks, 0.1) if name == "muon" else parameter_groups(model, 0.1)
    optimizer = (Muon if name == "muon" else AdamW)(groups, 1e-3, compile=compiled)
    inputs, targets = batch_of(config, workers)

    def step() -> Tensor:
        with deterministic(workers.device):
            value = model(inputs, targets)
            value.backward()
            clip_grad_norm([p.grad for p in model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def waits(config: ModelConfig, workers: ProcessGroup, name: str) -> int:
    """1 if a compiled step with this optimizer makes Python wait for the GPU."""
    step = steps_of(config, workers, compiled=True, name=name)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        print(f"      {name}: {error}")
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def repeats_differ(config: ModelConfig, workers: ProcessGroup, compiled: bool) -> int:
    """1 if three steps from the same start give other losses the second time: then a resumed run is not bit for bit."""
    losses = []
    for _ in range(2):
        step = steps_of(config, workers, compiled)
        losses.append([step().item() for _ in range(3)])
    return int(losses[0] != losses[1])


if __name__ == "__main__":
    main()
