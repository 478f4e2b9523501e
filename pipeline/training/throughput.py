"""The speed of a run: tokens per second, MFU, time left, and the progress line with them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.console import format_seconds

if TYPE_CHECKING:
    from pipeline.config.training import PretrainConfig
    from pipeline.training.step import StepResult


class ThroughputMeter:
    """Measures the time that steps take, without the pauses for checkpoints and evaluation.

    The first step of a process compiles and warms up, so it is timed separately; speed and time left count from the
    second one on.

    Model FLOPs utilisation (MFU) is (FLOPs of the tokens trained) / (seconds x peak FLOP/s of all workers), as in PaLM,
    appendix B. It is left out if the peak is None, that is, unknown.
    """

    def __init__(
        self, start_step: int, config: PretrainConfig, flops_per_token: float, peak_flops: float | None
    ) -> None:
        self.config = config
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.start_step = start_step
        self.first_step_seconds: float | None = None
        """Seconds of the first step, or None until it is done."""
        self.total_steps = self._steps = 0
        self.total_seconds = self._seconds = self._data_wait_seconds = 0.0
        self._since = time.perf_counter()

    def add(self, data_wait_seconds: float) -> None:
        """Count one more step as done."""
        now = time.perf_counter()
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._since
        else:
            self._steps += 1
            self._seconds += now - self._since
            self._data_wait_seconds += data_wait_seconds
        self._since = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time belongs to no step."""
        yield
        self._since = time.perf_counter()

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the speed since the last call; empty if no step but the first was done."""
        if not self._steps:
            return {}
        now = time.perf_counter()  # the caller has just waited for the device, which belongs to the steps
        seconds, steps = self._seconds + now - self._since, self._steps
        tokens_per_second = steps * self.config.tokens_per_step / seconds
        figures = {
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds / steps,
            "perf/data_wait_seconds": self._data_wait_seconds / steps,
        }
        if self.peak_flops is not None:
            figures["perf/mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        self.total_steps += steps
        self.total_seconds += seconds
        self._steps, self._seconds, self._data_wait_seconds, self._since = 0, 0.0, 0.0, now
        return figures

    def tokens_per_second(self) -> float:
        """Mean over all steps but the first; of the first if there was no other, and 0 if there was none."""
        steps, seconds = self.total_steps, self.total_seconds
        if not steps and self.first_step_seconds:
            steps, seconds = 1, self.first_step_seconds
        return steps * self.config.tokens_per_step / seconds if seconds else 0.0

    def line(self, done: int, loss: float, result: StepResult, speed: dict[str, float]) -> str:
        """The progress line; ``speed`` is the result of take_metrics()."""
        return (
            f"step {done:>{len(str(self.config.train_steps))}}/{self.config.train_steps}  loss {loss:.4f}  "
            f"lr {result.lr:.2e}  norm {result.grad_norm.item():.2f}  {self._pace(done, speed)}"
        )

    def _pace(self, done: int, speed: dict[str, float]) -> str:
        if not speed:
            return f"first step {self.first_step_seconds or 0.0:.1f} s"
        left = (self.config.train_steps - done) * self.total_seconds / self.total_steps
        mfu = f"  mfu {speed['perf/mfu']:.1%}" if "perf/mfu" in speed else ""
        return f"{speed['perf/tokens_per_second']:,.0f} tokens/s{mfu}  eta {format_seconds(left)}"
