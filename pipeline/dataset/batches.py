"""The data order: (seed, step, rank) -> micro-batches of inputs and targets.

The training stream is cut into windows of context_length + 1 tokens. Epoch e visits them in a pseudo-random permutation
that is computed per index, in O(1) memory and time, from (seed, e). Step s takes positions [s*G, (s+1)*G) of that
order, G being the windows of one step, and each rank a slice of them. So the order does not depend on the number of
workers, and the step number alone is enough to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch

from pipeline.dataset.packed import documents_of, num_learned, targets_of
from pipeline.dataset.shards import PackedStream, TokenStream
from pipeline.errors import UserError

_FEISTEL_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Windows of one forward pass on one rank."""

    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the inputs, shifted by one token; of packed conversations -1 where a token does not count."""
    weight: float
    """Factor for the mean loss of this micro-batch, such that the sum over a rank's micro-batches, averaged over ranks,
    is the mean loss of the step."""
    documents: torch.Tensor | None = None
    """(B, T) int64: which document or conversation of its window a token belongs to (Transformer.forward); None where
    a token sees all before it in the window."""
    all_count: bool = False
    """Whether, beside documents, every target counts."""

    def pinned(self) -> MicroBatch:
        """A copy in page-locked memory."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on ``device``; from page-locked memory it is made without waiting."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        documents = None if self.documents is None else change(self.documents)
        return replace(self, inputs=change(self.inputs), targets=change(self.targets), documents=documents)


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The windows that a rank trains on at a step."""

    num_windows: int
    """Windows in the training stream."""
    windows_per_step: int
    """G, windows of one optimizer step over all ranks."""
    batch_size: int
    """Windows of one micro-batch, at most."""
    seed: int
    """Random seed of the permutations."""

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise UserError("the training data is shorter than one window of context_length + 1 tokens; give more text")

    def step_windows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Indices (int64) of the windows of a rank's slice of ``step``, in training order."""
        first, end = (slice_end * self.windows_per_step // world_size for slice_end in (rank, rank + 1))
        positions = step * self.windows_per_step + np.arange(first, end, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_windows)
        windows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(offsets[chosen], size=self.num_windows, seed=self.seed, epoch=int(epoch))
        return windows

    def num_micro_batches(self, world_size: int) -> int:
        """Forward passes per step, the same on every rank, because each is a collective operation under FSDP."""
        largest = -(-self.windows_per_step // world_size)
        return -(-largest // self.batch_size)

    def micro_batch_windows(self, step: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The rank's windows, spread over its micro-batches as evenly as possible; some may be empty."""
        return np.array_split(self.step_windows(step, rank, world_size), self.num_micro_batches(world_size))


def micro_batches(
    stream: TokenStream,
    order: BatchOrder,
    *,
    context_length: int,
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
    document_token: int | None = None,
) -> Iterator[MicroBatch]:
    """Read a rank's part of a step, one micro-batch at a time, as window_batch does.

    A rank without windows left repeats its first one with weight zero, to join the collective operations.
    """
    groups = order.micro_batch_windows(step, rank, world_size)
    length = context_length + 1
    divisor: float = order.windows_per_step
    if isinstance(stream, PackedStream):
        divisor = _divisor_of_packed(stream, order.step_windows(step), length)
    for group in groups:
        weight = len(group) * world_size / divisor
        windows = group if len(group) else groups[0][:1]
        yield window_batch(stream, windows, length=length, weight=weight, device=device, document_token=document_token)


def window_batch(
    stream: TokenStream,
    windows: np.ndarray,
    *,
    length: int,
    weight: float,
    device: torch.device,
    document_token: int | None = None,
) -> MicroBatch:
    """Windows of ``length`` tokens as inputs and targets; of packed conversations with what sets them apart.

    Given the token that documents begin with, documents are set apart too.
    """
    tokens = read_windows(stream, windows, length=length, stride=length, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not isinstance(stream, PackedStream):
        documents = None if document_token is None else documents_in(inputs, document_token)
        return MicroBatch(
            inputs=inputs, targets=targets, weight=weight, documents=documents, all_count=documents is not None
        )
    flags = read_windows(stream.flags, windows, length=length, stride=length, device=device)
    return MicroBatch(
        inputs=inputs, targets=targets_of(targets, flags), weight=weight, documents=documents_of(flags[:, :-1])
    )


def documents_in(tokens: torch.Tensor, document_token: int) -> torch.Tensor:
    """(B, T) int64, which document of its window each token (B, T) belongs to; 0 where it began before the window."""
    return (tokens == document_token).long().cumsum(dim=1)


def _divisor_of_packed(stream: PackedStream, windows: np.ndarray, length: int) -> float:
    """What takes the place of the number of a step's windows: how many of them its targets that count would fill.

    The loss of a window is a sum over its targets that count, divided by the number of all. Every rank counts those of
    the whole step, on all ranks: so the loss is their mean, whatever rank has them.
    """
    counted = sum(num_learned(stream.flags.read(int(window) * length, length)) for window in windows)
    return max(1, counted) / (length - 1)


@dataclass(eq=False)
class BatchLoader:
    """A rank's micro-batches, each read by a thread while the one before it is computed.

    The thread changes when a micro-batch is read, not its content: any step may be requested at any time, and batches
    prepared for another step are dropped. For a GPU they are put into page-locked memory, from where they are copied
    while the GPU computes.
    """

    stream: TokenStream
    """The training tokens."""
    order: BatchOrder
    """The windows of every step."""
    _: KW_ONLY
    context_length: int
    """T, tokens of a window's inputs."""
    rank: int
    world_size: int
    device: torch.device
    """Where the batches are put."""
    document_token: int | None = None
    """The token that documents begin with, where no token is to see another document."""

    def __post_init__(self) -> None:
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Iterator[MicroBatch], Future[MicroBatch]] | None = None  # step, its batches, the next

    def step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of ``step``, on the device; after the last one the first of the next step is read."""
        if self._ahead is None or self._ahead[0] != step:
            self._read_ahead(step, self._batches(step))
        for left in range(self.order.num_micro_batches(self.world_size) - 1, -1, -1):
            assert self._ahead is not None
            _, batches, future = self._ahead
            batch = future.result()
            if left:
                self._read_ahead(step, batches)
            else:
                self._read_ahead(step + 1, self._batches(step + 1))
            yield batch.to(self.device)

    def _read_ahead(self, step: int, batches: Iterator[MicroBatch]) -> None:
        self._ahead = step, batches, self._reader.submit(self._read, batches)

    def _read(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        batch = next(batches)
        return batch.pinned() if self.device.type == "cuda" else batch

    def _batches(self, step: int) -> Iterator[MicroBatch]:
        return micro_batches(
            self.stream,
            self.order,
            context_length=self.context_length,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            device=torch.device("cpu"),
            document_token=self.document_token,
        )


def read_windows(
    stream: TokenStream, windows: np.ndarray, *, length: int, stride: int, device: torch.device
) -> torch.Tensor:
    """Tokens [w * stride, w * stride + length) of the stream for every window w: (B, length) int64."""
    tokens = np.stack([stream.read(int(window) * stride, length) for window in windows])
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def permute(indices: np.ndarray, *, size: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends each of ``indices`` (int64), O(1) an index.

    ``source`` is the number of the source in a mixture; the first one has the order that it has alone.

    A balanced Feistel network over the smallest even number of bits that holds ``size``, with cycle walking: values
    that fall outside are sent through again (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The
    domain is less than four times ``size``, so an index takes fewer than four walks on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch, *([source] if source else [])]).generate_state(
        _FEISTEL_ROUNDS, np.uint64
    )
    values = _feistel(indices.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
