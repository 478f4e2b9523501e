"""One optimizer step of the 124M recipe beside transformers' Llama and GPT-2 with torch.optim.AdamW, in one process.

    python benchmarks/train_step.py [--micro_batch 16 32 64] [--precision bf16] [--repeats 5] [--json FILE]

A step is forward, backward, clipping, AdamW. The contestants take turns, so a neighbour's load hits all of them; a
figure is the median over the repeats, behind it the lowest and the highest. Ratios are those of the medians. Needs
torch, numpy and transformers alone. On a CPU: float32, two windows per micro-batch, unless told otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.train_step_models import OURS, PEERS, PRESETS, Setting, make_step
from benchmarks.train_step_profile import profile_step
from pipeline.distributed.fsdp import backend_name, compute_dtype, join_workers, peak_flops


@dataclass
class Result:
    """What was measured of one contestant."""

    name: str
    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU time of all threads of this process: what a neighbour's load changes least."""
    step_memory_gib: float = 0.0
    """Peak during a step above what is held between steps."""
    first_step_seconds: float = 0.0
    """Compilation included."""
    profile: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.step_seconds)


def main() -> None:
    arguments = parse()
    if arguments.fsdp:
        start_group_of_one()
    workers = join_workers(arguments.device)
    on_gpu = workers.device.type == "cuda"
    if not on_gpu:
        torch._inductor.config.cpp.enable_kernel_profile = True  # names in the profile
    dtype = compute_dtype(arguments.precision or ("bf16" if on_gpu else "fp32"), workers.device)
    peak = peak_flops(workers, dtype) or best_matrix_rate(dtype, workers.device)
    report: dict[str, Any] = {"machine": machine(workers.device), "peak_flops": peak, "dtype": str(dtype), "runs": []}
    print(json.dumps(report["machine"]), f"peak {peak / 1e12:.2f} TFLOP/s in {dtype}", flush=True)
    for micro_batch in arguments.micro_batch or ([16, 32, 64] if on_gpu else [2]):
        setting = Setting(
            config=PRESETS[arguments.preset],
            micro_batch=micro_batch,
            dtype=dtype,
            workers=workers,
            repeatable=arguments.repeatable == "on",
        )
        results = measure(arguments.contestants, setting, arguments.repeats, arguments.steps)
        report["runs"].append(described(results, setting, peak))
        print_table(results, setting, peak)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="124M")
    parser.add_argument("--micro_batch", type=int, nargs="+", help="windows; 16 32 64 on a GPU, 2 on a CPU")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--contestants", nargs="+", choices=OURS + PEERS, default=list(OURS + PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat; 10 or more on a GPU")
    parser.add_argument("--repeatable", choices=["on", "off"], default="on", help="ours give the same bits every time")
    parser.add_argument("--fsdp", action="store_true", help="ours sharded by FSDP2 over one rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    return parser.parse_args()


def best_matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of 30 products of the recipe's own shape: a mean would measure the neighbours too."""
    rows = 2048 if device.type == "cpu" else 32768
    left, right = torch.randn(rows, 768, dtype=dtype, device=device), torch.randn(768, 2304, dtype=dtype, device=device)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * rows * 768 * 2304 / min(seconds)


def start_group_of_one() -> None:
    """A process group with this process alone in it: what Ray Train makes for one worker."""
    use_cuda = torch.cuda.is_available()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend_name(use_cuda), store=store, rank=0, world_size=1)


def measure(names: list[str], setting: Setting, num_repeats: int, num_steps: int) -> list[Result]:
    """Every contestant in turn, num_repeats times; one that runs out of memory is left out from then on."""
    results = [Result(name=name) for name in names]
    steps: dict[str, Callable[[], Any]] = {}
    for result in results:
        with _failing(result):
            steps[result.name] = make_step(result.name, setting)
            _warm_up(result, steps[result.name], setting)
    for _ in range(num_repeats):
        for result in (each for each in results if not each.failure):
            with _failing(result):
                _time(result, steps[result.name], num_steps)
    for result in (each for each in results if not each.failure):
        result.profile = profile_step(steps[result.name], setting.workers.device, setting.config.vocab_size)
    return results


@contextlib.contextmanager
def _failing(result: Result) -> Iterator[None]:
    """Too little memory inside ends this contestant, not the run."""
    try:
        yield
    except torch.OutOfMemoryError:
        result.failure = "out of memory"
        gc.collect()
        torch.cuda.empty_cache()


def _warm_up(result: Result, step: Callable[[], Any], setting: Setting) -> None:
    start = time.perf_counter()
    step().item()
    result.first_step_seconds = time.perf_counter() - start
    with MemoryPeak(setting.workers.device) as peak:
        step().item()
    result.step_memory_gib = peak.gib


def _time(result: Result, step: Callable[[], Any], num_steps: int) -> None:
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        loss = step()
    loss.item()  # waits for the device
    result.step_seconds.append((time.perf_counter() - start) / num_steps)
    result.cpu_seconds.append((time.process_time() - cpu_start) / num_steps)


class MemoryPeak:
    """Most memory in use inside the block, above what was in use before: the GPU's allocator, or resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gib = device, 0.0

    def __enter__(self) -> MemoryPeak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before, self._done = resident_bytes(), threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gib = (torch.cuda.max_memory_allocated(self.device) - self._before) / 2**30
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.gib = max(self.gib, (resident_bytes() - self._before) / 2**30)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def described(results: list[Result], setting: Setting, peak: float) -> dict[str, Any]:
    """For the JSON file."""
    rows = []
    for result in results:
        row: dict[str, Any] = {"name": result.name, "failure": result.failure}
        if not result.failure:
            speed = setting.tokens_per_step / result.median
            row |= {
                "tokens_per_second": speed,
                "mfu": speed * setting.config.flops_per_token() / peak,
                "step_seconds": result.step_seconds,
                "cpu_seconds": result.cpu_seconds,
                "step_memory_gib": result.step_memory_gib,
                "first_step_seconds": result.first_step_seconds,
                "profile_seconds": result.profile,
            }
        rows.append(row)
    return {"micro_batch": setting.micro_batch, "context_length": setting.config.context_length, "results": rows}


def print_table(results: list[Result], setting: Setting, peak: float) -> None:
    flops = setting.config.flops_per_token() * setting.tokens_per_step
    shape = f"{setting.micro_batch} x {setting.config.context_length}"
    print(f"\nmicro-batch {shape} tokens, {flops / 1e12:.2f} TFLOP a step, {1000 * flops / peak:.0f} ms at the peak")
    print(f"{'':16}{'tokens/s':>10}{'ms a step':>24}{'CPU s':>8}{'MFU':>7}{'GiB':>7}{'first s':>9}")
    good = [result for result in results if not result.failure]
    for result in results:
        if result.failure:
            print(f"{result.name:16}{result.failure:>24}")
            continue
        low, high = min(result.step_seconds), max(result.step_seconds)
        span = f"{1000 * result.median:,.0f} ({1000 * low:,.0f}..{1000 * high:,.0f})"
        speed = setting.tokens_per_step / result.median
        print(
            f"{result.name:16}{speed:>10,.0f}{span:>24}{statistics.median(result.cpu_seconds):>8.2f}"
            f"{flops / result.median / peak:>7.1%}{result.step_memory_gib:>7.2f}{result.first_step_seconds:>9.1f}"
        )
    _print_ratios(good)
    _print_profiles(good)


def _print_ratios(results: list[Result]) -> None:
    ours = [result for result in results if result.name in OURS]
    for peer in (result for result in results if result.name in PEERS):
        for mine in ours:
            cpu = statistics.median(peer.cpu_seconds) / statistics.median(mine.cpu_seconds)
            print(f"{mine.name} / {peer.name}: {peer.median / mine.median:.2f} times as fast (CPU time {cpu:.2f})")


def _print_profiles(results: list[Result]) -> None:
    if not results:
        return
    print("\nshare of a profiled step")
    for name in results[0].profile:
        shares = (f"{result.profile[name] * 1000:,.0f} ms" for result in results)
        print(f"{name:24}" + "".join(f"{share:>18}" for share in shares))
    print(f"{'':24}" + "".join(f"{result.name:>18}" for result in results), flush=True)


if __name__ == "__main__":
    main()
