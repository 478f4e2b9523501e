"""What benchmarks/train_step.py prints and writes down, each figure as soon as it is known."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.results import Results
from benchmarks.train_step_models import OURS, PEERS, Setting


@dataclass
class Result:
    """What was measured of one contestant."""

    name: str
    step_seconds: list[float] = field(default_factory=list)
    """One figure a turn."""
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU time of all threads of this process: what a neighbour's load changes least."""
    step_memory_gib: float = 0.0
    """Peak during a step above what is held between steps."""
    first_step_seconds: float = 0.0
    """Compilation included."""
    second_step_seconds: float = 0.0
    last_loss: float = 0.0
    profile: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.step_seconds)


class Report:
    """Of one size of micro-batch.

    Args:
        peak: FLOP/s that MFU is counted against.
        results: where every figure is written down.
    """

    def __init__(self, setting: Setting, peak: float, results: Results) -> None:
        self.setting, self.peak, self.results = setting, peak, results
        self.flops = setting.config.flops_per_token() * setting.tokens_per_step
        shape = f"{setting.micro_batch} x {setting.config.context_length}"
        mode = "on" if setting.deterministic else "off"
        print(
            f"\nmicro-batch {shape} tokens, {self.flops / 1e12:.2f} TFLOP a step, "
            f"{1000 * self.flops / peak:.0f} ms at the peak; ours: deterministic {mode}, FSDP2 {setting.fsdp}",
            flush=True,
        )

    @contextlib.contextmanager
    def failing(self, result: Result) -> Iterator[None]:
        """A failure inside ends this contestant, not the run; too little memory is a result and no failure."""
        with self.results.attempt(result.name):
            try:
                yield
            except torch.OutOfMemoryError:
                result.failure = "out of memory"
                self._add("out of memory", result)
                print(f"{result.name:16}{result.failure:>24}", flush=True)
            except BaseException:
                result.failure = "failed"
                raise
        if result.failure:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def first(self, result: Result) -> None:
        """It is compiled, and has made one step more: an early figure, should nothing follow."""
        speed = self.setting.tokens_per_step / result.second_step_seconds
        print(
            f"{result.name}: first step {result.first_step_seconds:.1f} s, the second alone {speed:,.0f} tokens/s, "
            f"{result.step_memory_gib:.2f} GiB",
            flush=True,
        )
        self._add(
            "first steps",
            result,
            first_step_seconds=result.first_step_seconds,
            second_step_seconds=result.second_step_seconds,
            step_memory_gib=result.step_memory_gib,
        )

    def head(self) -> None:
        """Of the table whose lines ``turn`` prints."""
        print(f"{'':16}{'tokens/s':>10}{'ms a step':>30}{'CPU s':>8}{'MFU':>7}{'GiB':>7}{'first s':>9}", flush=True)

    def turn(self, result: Result, *, is_last: bool) -> None:
        """One more turn; the line of the table and the medians with the last one."""
        self._add("turn", result, step_seconds=result.step_seconds[-1], loss=result.last_loss)
        if not is_last:
            return
        low, high = min(result.step_seconds), max(result.step_seconds)
        span = f"{1000 * result.median:,.1f} ({1000 * low:,.1f}..{1000 * high:,.1f})"
        speed = self.setting.tokens_per_step / result.median
        cpu_seconds = statistics.median(result.cpu_seconds)
        mfu = self.flops / result.median / self.peak
        print(
            f"{result.name:16}{speed:>10,.0f}{span:>30}{cpu_seconds:>8.2f}"
            f"{mfu:>7.1%}{result.step_memory_gib:>7.2f}{result.first_step_seconds:>9.1f}",
            flush=True,
        )
        self._add(
            "speed",
            result,
            tokens_per_second=speed,
            mfu=mfu,
            step_seconds=result.step_seconds,
            cpu_seconds=result.cpu_seconds,
            step_memory_gib=result.step_memory_gib,
            first_step_seconds=result.first_step_seconds,
        )

    def ratios(self, results: list[Result]) -> None:
        """Ours over each peer, by the medians."""
        good = [result for result in results if not result.failure]
        for peer in (result for result in good if result.name in PEERS):
            for mine in (result for result in good if result.name in OURS):
                ratio = peer.median / mine.median
                cpu = statistics.median(peer.cpu_seconds) / statistics.median(mine.cpu_seconds)
                print(f"{mine.name} / {peer.name}: {ratio:.2f} times as fast (CPU time {cpu:.2f})", flush=True)
                self._add("ratio", mine, peer=peer.name, times_as_fast=ratio, cpu_time_ratio=cpu)

    def profile(self, result: Result) -> None:
        """Where one step went."""
        self._add("profile", result, seconds=result.profile)

    def profiles(self, results: list[Result]) -> None:
        """The same as a table, contestants side by side."""
        good = [result for result in results if result.profile]
        if not good:
            return
        print("\nshare of a profiled step")
        for name in good[0].profile:
            print(f"{name:24}" + "".join(f"{result.profile[name] * 1000:>15,.1f} ms" for result in good))
        print(f"{'':24}" + "".join(f"{result.name:>18}" for result in good), flush=True)

    def _add(self, kind: str, result: Result, **values: object) -> None:
        self.results.add(
            kind,
            name=result.name,
            micro_batch=self.setting.micro_batch,
            context_length=self.setting.config.context_length,
            deterministic=self.setting.deterministic,
            fsdp=self.setting.fsdp,
            **values,
        )
