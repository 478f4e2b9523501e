"""What all ranks have to know about a step: whether it may update weights, and whether the run has to stop or save.

Everything that ranks must agree on travels in the one all-reduce that a step needs anyway, that of the gradient norm.
So all ranks act at the same step, without another collective operation. The device itself decides whether a step may
update; the host reads the numbers of a step on a GPU while the next one runs, so that it never waits for the device.
After a rejected step all updates stay disabled until the host has read the result.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dataset.shards import TokenStream
from pipeline.dataset.verification import ShardCheck
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import Interruptions
from pipeline.distributed.watchdog import Heartbeats, Watchdog
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.training import PretrainConfig

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 3.0
"""Longest rest of a step that a run which was asked to end still computes."""
_PREEMPTION_SECONDS = 5.0  # between two checks for preemption


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What one rank, or any of them, reports at a step."""

    stop: bool = False
    """The run is to end after this step."""
    check_preemption: bool = False
    """All ranks are to check whether a node is about to be preempted."""
    failed: bool = False
    """A rank cannot continue."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One step over all ranks, as the host reads it."""

    step: int
    """The step, counted from 0."""
    loss: float
    """Mean loss over the windows of the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    flags: Flags
    """Each flag is set if any rank has set it."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def needs_sync(self) -> bool:
        """Whether the host has to wait for the newest step too before it acts."""
        return self.flags != Flags()


@dataclass(frozen=True, kw_only=True)
class ReducedStep:
    """One step over all ranks, as tensors on the device, () each."""

    squared_norm: Tensor
    loss: Tensor
    allowed: Tensor
    """Whether the step may update weights and moments."""


class StepOutcomes:
    """The outcomes of the steps of a run: ``all_reduce`` is called within each step, ``take`` between steps."""

    def __init__(self, workers: ProcessGroup) -> None:
        self.workers = workers
        self._allowed = torch.ones((), dtype=torch.bool, device=workers.device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def all_reduce(self, step: int, squared_norm: Tensor, loss: Tensor, flags: Flags) -> ReducedStep:
        """Sum over ranks. Collective; nothing waits for the device.

        Args:
            squared_norm: squared norm of this rank's part of the gradients, () float32.
            loss: this rank's share of the mean loss, () float32; the average over ranks is the loss of the step.
            flags: what this rank has to report.
        """
        numbers = [float(flag) for flag in (flags.stop, flags.check_preemption, flags.failed)]
        scalars = [squared_norm.new_full((), number) for number in numbers]
        sums = self.workers.sum(torch.stack([squared_norm, loss / self.workers.world_size, *scalars]))
        self._allowed = self._allowed & torch.isfinite(sums[:2]).all() & (sums[4] == 0)
        self._pending.append((step, *_to_host(sums)))
        return ReducedStep(squared_norm=sums[0], loss=sums[1], allowed=self._allowed)

    def take(self, *, everything: bool) -> list[Outcome]:
        """The outcomes not taken yet, oldest first: all, or on a GPU all but the newest, which may not be there yet."""
        keep = 0 if everything or self.workers.device.type == "cpu" else 1
        taken = []
        while len(self._pending) > keep:
            step, numbers, written = self._pending.popleft()
            if written is not None:
                written.synchronize()
            squared_norm, loss, *counts = numbers.tolist()
            stop, check_preemption, failed = (count > 0 for count in counts)
            flags = Flags(stop=stop, check_preemption=check_preemption, failed=failed)
            taken.append(Outcome(step=step, loss=loss, grad_norm=squared_norm**0.5, flags=flags))
        return taken

    def resume_updates(self) -> None:
        """Allow updates again after a rejected step, and drop the outcomes of the steps computed since."""
        self._pending.clear()
        self._allowed = torch.ones_like(self._allowed)


class StepGuard:
    """One rank's view of the state of the run between steps; a context in which its threads run.

    Args:
        streams: token streams whose shards are verified in the background.
        interruptions: what may end the run early.
    """

    def __init__(
        self,
        config: PretrainConfig,
        workers: ProcessGroup,
        streams: Sequence[TokenStream],
        interruptions: Interruptions,
    ) -> None:
        self.workers, self.interruptions = workers, interruptions
        self.outcomes = StepOutcomes(workers)
        self.pending_error: UserError | None = None
        """Why this rank cannot continue; raised on all ranks at the end of the step."""
        self.is_stopping = False
        """Whether all ranks end the run after this step and its checkpoint."""
        self.wants_checkpoint = False
        """Whether all ranks save a checkpoint after this step."""
        heartbeats = None
        if workers.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            heartbeats = Heartbeats(store, rank=workers.rank, world_size=workers.world_size)
        self.watchdog = Watchdog(rank=workers.rank, limit_seconds=config.collective_timeout, heartbeats=heartbeats)
        self.check = ShardCheck(
            [files for stream in streams for files in stream.file_sets],
            share=int(os.environ.get("LOCAL_RANK", "0")),
            num_shares=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        self._preemption_checked = time.monotonic()
        self._preemption_seen = False

    def __enter__(self) -> StepGuard:
        self.check.start()
        self.watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.__exit__()
        self.check.stop()

    def flags(self, save_error: UserError | None) -> Flags:
        """What this rank reports at the end of a step; ``save_error`` is the error of a failed save, if any."""
        self.pending_error = self.pending_error or self.check.error or save_error
        check_preemption = (
            self.workers.is_rank_zero
            and self.interruptions.preemption_pending is not None
            and time.monotonic() - self._preemption_checked > _PREEMPTION_SECONDS
        )
        if check_preemption:
            self._preemption_checked = time.monotonic()
        return Flags(
            stop=self.interruptions.stop_requested(),
            check_preemption=check_preemption,
            failed=self.pending_error is not None,
        )

    def stops_now(self, seconds_left: float) -> bool:
        """Whether the run was asked to end, and a rank's step takes too long for that. Collective.

        Args:
            seconds_left: what this rank expects the rest of its step to take.
        """
        stops = self.interruptions.stop_requested() and seconds_left > PATIENCE_SECONDS
        return bool(self.workers.sum(torch.tensor(stops, dtype=torch.int64, device=self.workers.device)).item())

    def take_outcomes(self, *, everything: bool) -> list[Outcome]:
        """The outcomes that are due, oldest first (see StepOutcomes.take). Collective if a rank has set a flag.

        Raises:
            UserError: any rank cannot continue; every rank raises its error.
        """
        outcomes = self.outcomes.take(everything=everything)
        if any(outcome.needs_sync for outcome in outcomes):
            outcomes += self.outcomes.take(everything=True)
        if any(outcome.flags.failed for outcome in outcomes):
            self.workers.raise_on_all_ranks(self.pending_error)
        if any(outcome.flags.stop for outcome in outcomes):
            self.is_stopping = self.wants_checkpoint = True
        if any(outcome.flags.check_preemption for outcome in outcomes):
            self._check_preemption()
        return outcomes

    def _check_preemption(self) -> None:
        pending = self.interruptions.preemption_pending
        assert pending is not None
        if pending() and not self._preemption_seen:
            self._preemption_seen = self.wants_checkpoint = True
            if self.workers.is_rank_zero:
                logger.warning("a node is about to leave: one more checkpoint now, from which a new group goes on")


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the memory of the host, and the event after which it is complete."""
    if numbers.device.type == "cpu":
        return numbers.clone(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    written = torch.cuda.Event()
    written.record()
    return copy, written
