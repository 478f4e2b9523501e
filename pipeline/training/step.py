"""One optimizer step: what it results in, and the gradients of its micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import Transformer
from pipeline.dataset.batches import BatchLoader, MicroBatch
from pipeline.distributed.fsdp import set_gradient_sync
from pipeline.errors import UserError
from pipeline.training.step_guard import StepGuard


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, the same on every rank; tensors, so that nothing waits for the device."""

    loss: Tensor
    """Mean over the step's windows, () float32."""
    grad_norm: Tensor
    """Global norm before clipping, () float32."""
    lr: float
    """Learning rate of the step."""
    data_wait_seconds: float
    """Seconds that this rank waited for batches."""
    is_rejected: bool = False
    """Whether loss or gradient was not finite, so that nothing was updated."""


class StepAbandoned(Exception):  # noqa: N818  # nothing is wrong
    """The run was asked to end while the micro-batches of a step were computed; nothing of the step has an effect."""


def accumulate_gradients(
    model: Transformer, loader: BatchLoader, step: int, guard: StepGuard, seconds_left: Callable[[int, int], float]
) -> tuple[Tensor, float]:
    """Forward and backward over the micro-batches of ``step``. Collective.

    On the CPU, where a step may take minutes, requests to end the run are looked for after each of them, and a step
    that would go on for long is abandoned. The last micro-batch is computed all the same, as its backward brings a
    sharded network back into its shards.

    Args:
        seconds_left: called with the number of micro-batches that are done and their count; what the others will take.

    Returns:
        This rank's share of the mean loss, () float32, and the seconds spent waiting for batches.

    Raises:
        StepAbandoned: on every rank, because the run was asked to end.
    """
    loss = torch.zeros((), device=loader.device)
    data_wait_seconds = 0.0
    batches = loader.step(step)
    count = loader.order.num_micro_batches(loader.world_size)
    is_abandoned = False
    for index in range(count):
        if is_abandoned and index < count - 1:
            continue
        start = time.perf_counter()
        batch = _next_batch(batches, loader, guard)
        data_wait_seconds += time.perf_counter() - start
        set_gradient_sync(model, enabled=index == count - 1)
        micro_loss = model(batch.inputs, batch.targets, documents=batch.documents, all_count=batch.all_count)
        micro_loss = micro_loss * batch.weight
        micro_loss.backward()
        loss += micro_loss.detach()
        if loader.device.type == "cpu" and index < count - 1 and not is_abandoned:
            is_abandoned = guard.stops_now(seconds_left(index + 1, count))
    if is_abandoned:
        raise StepAbandoned
    return loss, data_wait_seconds


def _next_batch(batches: Iterator[MicroBatch], loader: BatchLoader, guard: StepGuard) -> MicroBatch:
    """The next micro-batch, or one of zeros with weight 0 if this rank cannot read its shards.

    The rank then still takes part in the collectives of the step, and all ranks learn of the error at its end.
    """
    if guard.pending_error is None:
        try:
            return next(batches)
        except UserError as error:
            guard.pending_error = error
    shape = (min(loader.order.batch_size, loader.order.windows_per_step), loader.context_length)
    zeros = torch.zeros(shape, dtype=torch.int64, device=loader.device)
    documents = None if loader.document_token is None else zeros
    return MicroBatch(inputs=zeros, targets=zeros, weight=0.0, documents=documents, all_count=documents is not None)
