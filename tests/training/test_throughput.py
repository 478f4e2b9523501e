"""Speed and time left: counted from the second step on, pauses left out, MFU only where the peak is known."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch

from pipeline.config.training import PretrainConfig
from pipeline.console import format_seconds
from pipeline.training import throughput
from pipeline.training.step import StepResult
from pipeline.training.throughput import ThroughputMeter

CONFIG = PretrainConfig(context_length=32, batch_size=4, tokens_per_step=128, train_steps=100, num_workers=1)
RESULT = StepResult(loss=torch.tensor(2.5), grad_norm=torch.tensor(0.75), lr=1e-3, data_wait_seconds=0.0)


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for the meter."""
    now = [1000.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def make_meter(peak_flops: float | None = None, **changes: int) -> ThroughputMeter:
    return ThroughputMeter(0, dataclasses.replace(CONFIG, **changes), flops_per_token=1e6, peak_flops=peak_flops)  # type: ignore[arg-type]


def test_the_first_step_is_no_part_of_speed_and_time_left(wait: Callable[[float], None]) -> None:
    meter = make_meter(peak_flops=1e9)
    with meter.paused():
        wait(500)  # an evaluation that is compiled before
    wait(60)
    meter.add(data_wait_seconds=30)
    speed = meter.take_metrics()
    assert speed == {}
    line = meter.line(1, 2.5, RESULT, speed, 0.26)
    assert line == "step   1/100  loss 2.5000  lr 1.00e-03  norm 0.75  first step 60.0 s  memory 0.3 GiB"
    for _ in range(4):
        wait(2)
        meter.add(data_wait_seconds=0.5)
        with meter.paused():
            wait(7)
    speed = meter.take_metrics()
    expected = {"perf/tokens_per_second": 64.0, "perf/step_seconds": 2.0, "perf/data_wait_seconds": 0.5}
    assert speed == expected | {"perf/mfu": pytest.approx(0.064)}
    assert meter.line(5, 2.5, RESULT, speed, 61.24).endswith("64 tokens/s  mfu 6.4%  eta 3:10  memory 61.2 GiB")
    assert meter.tokens_per_second() == 64.0


def test_a_resumed_run_whose_first_step_is_not_told_counts_from_the_second(wait: Callable[[float], None]) -> None:
    meter = make_meter()
    for seconds in (60, 2, 2):
        wait(seconds)
        meter.add(data_wait_seconds=0.0)
    assert meter.take_metrics()["perf/step_seconds"] == 2.0


def test_without_a_peak_there_is_no_mfu(wait: Callable[[float], None]) -> None:
    meter = make_meter()
    for _ in range(2):
        wait(2)
        meter.add(data_wait_seconds=0.0)
    speed = meter.take_metrics()
    assert "perf/mfu" not in speed
    assert meter.line(2, 2.5, RESULT, speed, 1.0).endswith("norm 0.75  64 tokens/s  eta 3:16  memory 1.0 GiB")


def test_a_run_of_one_step_has_the_speed_of_that_step(wait: Callable[[float], None]) -> None:
    meter = make_meter()
    assert meter.tokens_per_second() == 0.0
    wait(4)
    meter.add(data_wait_seconds=0.0)
    assert meter.take_metrics() == {} and meter.tokens_per_second() == 32.0


def test_a_long_step_tells_where_it_is_and_how_long_it_and_the_run_take(
    wait: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The first micro-batch compiles, 60 s; the others take 4 s each, 8 of them a step, 100 steps."""
    caplog.set_level(logging.INFO, logger="pipeline")
    meter = make_meter()
    wait(60)
    assert meter.add_micro_batch(1, 8) == 0.0
    wait(4)
    assert meter.add_micro_batch(2, 8) == 4.0 * 6
    assert caplog.messages == [
        "step 1/100: micro-batch 2 of 8; a step takes about 0:32 (4 tokens/s), all that is left 53:12"
    ]
    for done in range(3, 5):
        wait(4)
        assert meter.add_micro_batch(done, 8) == 4.0 * (8 - done)
    assert len(caplog.messages) == 1, "8 s since the last line"
    wait(16)
    meter.add(data_wait_seconds=0)
    wait(40)
    assert meter.add_micro_batch(1, 8) == 40.0 * 7, "a later step counts from its beginning"
    assert caplog.messages[1].startswith("step 2/100: micro-batch 1 of 8; a step takes about 5:20 ")
    assert "takes minutes on this machine; a smaller --tokens_per_step" in caplog.messages[2]
    wait(40)
    meter.add_micro_batch(2, 8)
    assert len(caplog.messages) == 4, "the warning comes once"


def test_a_line_between_those_of_log_every_comes_after_ten_seconds(wait: Callable[[float], None]) -> None:
    meter = make_meter()
    wait(20)
    meter.add(data_wait_seconds=0)
    meter.line(1, 2.5, RESULT, meter.take_metrics(), 1.0)
    wait(4)
    meter.add(data_wait_seconds=0)
    assert meter.short_line(2, 2.5) is None
    wait(6)
    meter.add(data_wait_seconds=0)
    assert meter.short_line(3, 2.5) == "step   3/100  loss 2.5000  26 tokens/s  eta 8:05"
    assert meter.short_line(4, 2.5) is None


def test_times_of_days_are_said_in_days() -> None:
    assert [format_seconds(seconds) for seconds in (123, 3723, 172_799, 172_800, 38_102_400)] == [
        *("2:03", "1:02:03", "47:59:59", "2 days", "441 days")
    ]
