"""What looks after a run between its steps: has any rank a reason to end it, to save now, to leave a step out?

Every rank has a guard; what one of them knows reaches all in the step's own sum (outcomes.py), so that all act at the
same boundary. Nothing here costs a step a collective operation, or a wait for the device.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from pipeline.dataset.shards import TokenStream
from pipeline.dataset.verification import ShardCheck
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import Interruptions
from pipeline.distributed.watchdog import Heartbeats, Watchdog
from pipeline.errors import UserError
from pipeline.training.outcomes import Flags, Outcome, Outcomes

if TYPE_CHECKING:
    from pipeline.config.training import PretrainConfig

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0  # between two questions whether nodes are about to leave


class Guard:
    """One rank's part in keeping a run whole; a context in which its threads run.

    Args:
        streams: whose shards are read again beside the training.
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
        self.outcomes = Outcomes(workers)
        self.trouble: UserError | None = None
        """Why this rank cannot go on."""
        self.is_stopping = False
        """All ranks: the run ends behind this step and its checkpoint."""
        self.wants_checkpoint = False
        """All ranks: one more checkpoint now."""
        self.watchdog = Watchdog(
            rank=workers.rank, limit_seconds=config.collective_timeout, heartbeats=_heartbeats(workers)
        )
        self.check = ShardCheck(
            [stream.files for stream in streams if stream.files is not None],
            share=int(os.environ.get("LOCAL_RANK", "0")),
            num_shares=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        self._looked = time.monotonic()
        self._knows_of_leaving = False

    def __enter__(self) -> Guard:
        self.check.start()
        self.watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.__exit__()
        self.check.stop()

    def flags(self, trouble: UserError | None) -> Flags:
        """What this rank has to say at the end of a step; ``trouble``: of the checkpoint writer, if it has any."""
        self.trouble = self.trouble or self.check.error or trouble
        look = (
            self.workers.is_rank_zero
            and self.interruptions.preemption_pending is not None
            and time.monotonic() - self._looked > _LOOK_SECONDS
        )
        if look:
            self._looked = time.monotonic()
        return Flags(stop=self.interruptions.stop_requested(), look=look, failed=self.trouble is not None)

    def read(self, *, everything: bool) -> list[Outcome]:
        """The outcomes that are due, oldest first (see Outcomes.read). Collective where a rank has said something.

        Raises:
            UserError: any rank cannot go on; its sentence, on every rank.
        """
        found = self.outcomes.read(everything=everything)
        if any(outcome.needs_all for outcome in found):
            found += self.outcomes.read(everything=True)
        if any(outcome.failed for outcome in found):
            self.workers.raise_on_all_ranks(self.trouble)
        if any(outcome.stop for outcome in found):
            self.is_stopping = self.wants_checkpoint = True
        if any(outcome.look for outcome in found):
            self._look()
        return found

    def _look(self) -> None:
        ask = self.interruptions.preemption_pending
        assert ask is not None
        if ask() and not self._knows_of_leaving:
            self._knows_of_leaving = self.wants_checkpoint = True
            if self.workers.is_rank_zero:
                logger.warning("a node is about to leave: one more checkpoint now, from which a new group goes on")


def _heartbeats(workers: ProcessGroup) -> Heartbeats | None:
    if workers.world_size == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    return Heartbeats(store, rank=workers.rank, world_size=workers.world_size)
