"""One optimizer step of the 124M recipe beside transformers' Llama and GPT-2 with torch.optim.AdamW, in one process.

    python benchmarks/train_step.py [--micro_batch 16 32 64] [--precision bf16] [--repeats 5] [--jsonl FILE]

A step is forward, backward, clipping, AdamW. The contestants take turns, so a neighbour's load hits all of them; a
figure is the median over the repeats, behind it the lowest and the highest. Ratios are those of the medians. Needs
torch, numpy and transformers alone. On a CPU: float32, two windows per micro-batch, unless told otherwise.

Everything is printed and written as soon as it is known: a first figure when a contestant is compiled, every turn, the
medians with the last turn, then the profile. A contestant that fails ends with a sentence, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measuring import forget_compiled
from benchmarks.results import Results, add_result_arguments
from benchmarks.train_step_models import OURS, PEERS, PRESETS, Setting, make_step
from benchmarks.train_step_profile import profile_step
from benchmarks.train_step_report import Report, Result
from pipeline.distributed.hardware import compute_dtype, peak_flops
from pipeline.distributed.process_group import backend_name, init_distributed


def main() -> None:
    arguments = parse()
    if arguments.fsdp:
        start_group_of_one(arguments.device)
    workers = init_distributed(arguments.device)
    on_gpu = workers.device.type == "cuda"
    if not on_gpu:
        torch._inductor.config.cpp.enable_kernel_profile = True  # names in the profile
    dtype = compute_dtype(arguments.precision or ("bf16" if on_gpu else "fp32"), workers.device)
    peak = peak_flops(workers, dtype) or best_matrix_rate(dtype, workers.device)
    results = Results(arguments.jsonl, arguments.label)
    results.add("machine", **machine(workers.device), peak_flops=peak, dtype=str(dtype))
    print(json.dumps(machine(workers.device)), f"peak {peak / 1e12:.2f} TFLOP/s in {dtype}", flush=True)
    for micro_batch in arguments.micro_batch or ([16, 32, 64] if on_gpu else [2]):
        setting = Setting(
            config=PRESETS[arguments.preset],
            micro_batch=micro_batch,
            dtype=dtype,
            workers=workers,
            deterministic=arguments.deterministic == "on",
            fsdp=arguments.fsdp,
        )
        measure(arguments, Report(setting, peak, results))
        forget_compiled()
    raise SystemExit(1 if results.failures else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="124M")
    parser.add_argument("--micro_batch", type=int, nargs="+", help="windows; 16 32 64 on a GPU, 2 on a CPU")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--contestants", nargs="+", choices=OURS + PEERS, default=list(OURS + PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat; 10 or more on a GPU")
    parser.add_argument("--deterministic", choices=["on", "off"], default="on", help="ours: the same bits every time")
    parser.add_argument("--profile", choices=["on", "off"], default="on", help="one more step of each, by kind of work")
    parser.add_argument("--fsdp", action="store_true", help="ours sharded by FSDP2 over one rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_result_arguments(parser)
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


def start_group_of_one(device: str) -> None:
    """A process group with this process alone in it: what Ray Train makes for one worker."""
    use_cuda = device != "cpu" and torch.cuda.is_available()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend_name(use_cuda), store=store, rank=0, world_size=1)


def measure(arguments: argparse.Namespace, report: Report) -> None:
    """Every contestant in turn, as often as asked for; one that fails is left out from then on."""
    setting = report.setting
    results = [Result(name=name) for name in arguments.contestants]
    steps: dict[str, Callable[[], Any]] = {}
    for result in results:
        with report.failing(result):
            steps[result.name] = make_step(result.name, setting)
            _warm_up(result, steps[result.name], setting)
            report.first(result)
    report.head()
    for turn in range(arguments.repeats):
        for result in (each for each in results if not each.failure):
            with report.failing(result):
                _time(result, steps[result.name], arguments.steps)
                report.turn(result, is_last=turn == arguments.repeats - 1)
    report.ratios(results)
    if arguments.profile == "off":
        return
    for result in (each for each in results if not each.failure):
        with report.failing(result):
            result.profile = profile_step(steps[result.name], setting.workers.device, setting.config.vocab_size)
            report.profile(result)
    report.profiles(results)


def _warm_up(result: Result, step: Callable[[], Any], setting: Setting) -> None:
    start = time.perf_counter()
    step().item()
    result.first_step_seconds = time.perf_counter() - start
    with MemoryPeak(setting.workers.device) as peak:
        start = time.perf_counter()
        step().item()
        result.second_step_seconds = time.perf_counter() - start
    result.step_memory_gib = peak.gib


def _time(result: Result, step: Callable[[], Any], num_steps: int) -> None:
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        loss = step()
    result.last_loss = loss.item()  # waits for the device
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


if __name__ == "__main__":
    main()
