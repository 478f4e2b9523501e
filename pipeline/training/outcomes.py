"""What a step came to, on every rank alike: its loss, whether it may change weights, whether the run is to end.

All that ranks have to agree upon travels in the one sum over ranks that a step makes anyway, that of the gradient norm.
The device itself decides whether the step may change anything. The host reads the numbers of a step on a GPU only when
the next step is under way, so that nothing waits for the device. After a step that may not change anything, none may,
until the host has read of it and says so: everything is then still as it was before that step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed.process_group import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What one rank has to say at a step."""

    stop: bool = False
    """The run is to end with this step."""
    look: bool = False
    """All ranks are to ask whether nodes are about to leave."""
    failed: bool = False
    """This rank cannot go on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One step as all ranks together saw it."""

    step: int
    """From 0."""
    loss: float
    """Mean over the step's windows."""
    grad_norm: float
    """Before clipping."""
    stop: bool
    look: bool
    failed: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def needs_all(self) -> bool:
        """Whether the host has to know of the newest step too before it acts."""
        return self.stop or self.look or self.failed


class Outcomes:
    """The outcomes of a run's steps, in order.

    ``add`` is called inside the step and gives what the optimizer needs to know; ``read`` is called between steps.
    """

    def __init__(self, workers: ProcessGroup) -> None:
        self.workers = workers
        self._allowed = torch.ones((), dtype=torch.bool, device=workers.device)
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, norm_squared: Tensor, loss: Tensor, flags: Flags) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over ranks. Collective; nothing waits for the device.

        Args:
            norm_squared: of this rank's part of the gradients, () float32.
            loss: this rank's share of the step's mean loss, () float32; averaged over ranks it is the loss.

        Returns:
            Of all ranks together: squared gradient norm, loss, and whether the step may change anything, () each.
        """
        said = [norm_squared.new_full((), float(flag)) for flag in (flags.stop, flags.look, flags.failed)]
        numbers = self.workers.sum(torch.stack([norm_squared, loss / self.workers.world_size, *said]))
        self._allowed = self._allowed & torch.isfinite(numbers[:2]).all() & (numbers[4] == 0)
        self._unread.append((step, *_to_host(numbers)))
        return numbers[0], numbers[1], self._allowed

    def read(self, *, everything: bool) -> list[Outcome]:
        """Outcomes not read yet, oldest first: all, or on a GPU all but the newest, which may not be there yet."""
        keep = 0 if everything or self.workers.device.type == "cpu" else 1
        found = []
        while len(self._unread) > keep:
            step, numbers, written = self._unread.popleft()
            if written is not None:
                written.synchronize()
            norm_squared, loss, stop, look, failed = numbers.tolist()
            found.append(
                Outcome(
                    step=step,
                    loss=loss,
                    grad_norm=norm_squared**0.5,
                    stop=stop > 0,
                    look=look > 0,
                    failed=failed > 0,
                )
            )
        return found

    def go_on(self) -> None:
        """Steps may change weights again; what was computed meanwhile counts for nothing."""
        self._unread.clear()
        self._allowed = torch.ones_like(self._allowed)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory, and what says that it is there."""
    if numbers.device.type == "cpu":
        return numbers.clone(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    written = torch.cuda.Event()
    written.record()
    return copy, written
