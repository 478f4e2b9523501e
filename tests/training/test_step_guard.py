"""After a rejected step all updates stay disabled until the host has read the result."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.training.step_guard import Flags, StepOutcomes

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(("norm_squared", "loss", "failed"), [(math.inf, 1.0, 0), (4.0, math.nan, 0), (4.0, 1.0, 1)])
def test_after_a_bad_step_nothing_is_allowed_until_the_host_says_so(
    norm_squared: float, loss: float, failed: int
) -> None:
    outcomes = StepOutcomes(ALONE)

    def add(step: int, norm: float, loss: float, flags: Flags) -> bool:
        return bool(outcomes.all_reduce(step, torch.tensor(norm), torch.tensor(loss), flags).allowed)

    assert add(0, 4.0, 1.0, Flags())
    assert not add(1, norm_squared, loss, Flags(failed=bool(failed)))
    assert not add(2, 4.0, 1.0, Flags())
    first, second, _ = outcomes.take(everything=False)
    assert (first.step, first.loss, first.grad_norm, first.is_finite, first.needs_sync) == (0, 1.0, 2.0, True, False)
    assert (second.is_finite, second.needs_sync) == (bool(failed), bool(failed))
    outcomes.resume_updates()
    assert add(2, 4.0, 1.0, Flags(stop=True))
    (third,) = outcomes.take(everything=True)
    assert third.flags.stop and third.needs_sync and not third.flags.check_preemption
