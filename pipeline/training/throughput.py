"""The speed of a run: tokens per second, MFU, time left, and the progress line with them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.console import format_seconds

if TYPE_CHECKING:
    from pipeline.config.training import PretrainConfig
    from pipeline.training.step import StepResult


logger = logging.getLogger(__name__)

SILENT_SECONDS = 10.0
"""After so many seconds without a line one is due, whatever --log_every says."""
_LONG_STEP_SECONDS = 120.0


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
        self._micro_batches_from = (0, self._since)
        self._shown_at = self._since
        self._warned = False

    def add_micro_batch(self, done: int, count: int) -> float:
        """Count ``done`` of the ``count`` micro-batches of a step as computed; logs how far a long step is.

        The first micro-batch of a process compiles, so until a step is done only the others tell how long one takes.

        Returns:
            The seconds that the others of this step will take.
        """
        now = time.perf_counter()
        if done == 1:
            is_first_step = self.first_step_seconds is None
            self._micro_batches_from = (1, now) if is_first_step else (0, self._since)
        begin, since = self._micro_batches_from
        if done == begin:
            return 0.0
        seconds = (now - since) / (done - begin) * count
        if now - self._shown_at >= SILENT_SECONDS:
            self._shown_at = now
            self._log_long_step(done, count, seconds)
        return seconds * (count - done) / count

    def _log_long_step(self, done: int, count: int, seconds: float) -> None:
        """Say how far a step is that takes ``seconds`` in all, and how long the run will take."""
        step = self.start_step + self.total_steps + self._steps + (self.first_step_seconds is not None)
        left = (self.config.train_steps - step - done / count) * seconds
        logger.info(
            "step %d/%d: micro-batch %d of %d; a step takes about %s (%s tokens/s), all that is left %s",
            step + 1,
            self.config.train_steps,
            done,
            count,
            format_seconds(seconds),
            f"{self.config.tokens_per_step / seconds:,.0f}",
            format_seconds(left),
        )
        if seconds > _LONG_STEP_SECONDS and not self._warned:
            self._warned = True
            logger.warning(
                "a step of %s tokens takes minutes on this machine; a smaller --tokens_per_step, --num_layers or "
                "--d_model makes it shorter (configs/small.yaml is made for a laptop)",
                f"{self.config.tokens_per_step:,}",
            )

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

    def line(self, done: int, loss: float, result: StepResult, speed: dict[str, float], memory_gib: float) -> str:
        """The progress line; ``speed`` is the result of take_metrics()."""
        self._shown_at = time.perf_counter()
        return (
            f"{self._count(done)}  loss {loss:.4f}  "
            f"lr {result.lr:.2e}  norm {result.grad_norm.item():.2f}  {self._pace(done, speed)}  "
            f"memory {memory_gib:.1f} GiB"
        )

    def short_line(self, done: int, loss: float) -> str | None:
        """A line between those of --log_every, where they are far apart; None where none is due."""
        now = time.perf_counter()
        steps, seconds = self.total_steps + self._steps, self.total_seconds + self._seconds
        if not steps or now - self._shown_at < SILENT_SECONDS:
            return None
        self._shown_at = now
        speed = steps * self.config.tokens_per_step / seconds
        left = format_seconds((self.config.train_steps - done) * seconds / steps)
        return f"{self._count(done)}  loss {loss:.4f}  {speed:,.0f} tokens/s  eta {left}"

    def _count(self, done: int) -> str:
        return f"step {done:>{len(str(self.config.train_steps))}}/{self.config.train_steps}"

    def _pace(self, done: int, speed: dict[str, float]) -> str:
        if not speed:
            return f"first step {self.first_step_seconds or 0.0:.1f} s"
        left = (self.config.train_steps - done) * self.total_seconds / self.total_steps
        mfu = f"  mfu {speed['perf/mfu']:.1%}" if "perf/mfu" in speed else ""
        return f"{speed['perf/tokens_per_second']:,.0f} tokens/s{mfu}  eta {format_seconds(left)}"
