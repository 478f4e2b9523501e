"""The data order of a mixture, as that of one source (batches.py): a function of settings and step alone, O(1).

The sources lie end to end, each cut into its own windows. How many windows each gives to a step is in proportions.py;
so the number that it gave before any step is known at once, and with it which of its own epochs, and which windows of
that epoch's permutation, come next. A phase has other weights from its first step on, and a schedule of its own.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pipeline.dataset.batches import BatchOrder, permute
from pipeline.dataset.proportions import Counts, Proportions
from pipeline.dataset.shards import Tokens, TokenStream

Phases: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""First step of each phase, from 0 on and rising, and the parts that each source has of its windows."""


@dataclass(frozen=True, kw_only=True)
class MixedOrder(BatchOrder):
    """The windows that a rank trains on at a step, from several sources."""

    source_windows: tuple[int, ...]
    """Windows of each source; num_windows is their sum."""
    phases: Phases
    _proportions: list[Proportions] = field(init=False, repr=False, compare=False)
    _before: list[Counts] = field(init=False, repr=False, compare=False)
    """Windows of each source before each phase."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = [Proportions(parts, self.windows_per_step) for _, parts in self.phases]
        before = [np.zeros(len(self.source_windows), dtype=np.int64)]
        for proportions, (first, _), (end, _) in zip(found, self.phases, self.phases[1:], strict=False):
            before.append(before[-1] + proportions.before(end - first))
        object.__setattr__(self, "_proportions", found)  # frozen for its users
        object.__setattr__(self, "_before", before)

    def windows_before(self, step: int) -> Counts:
        """Windows that each source gives to steps [0, step), (k,) int64."""
        phase = bisect.bisect_right(self.phases, step, key=lambda each: each[0]) - 1
        since: Counts = self._before[phase] + self._proportions[phase].before(step - self.phases[phase][0])
        return since

    def step_windows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Indices (int64) of the windows of a rank's slice of ``step``: those of source 0, then of source 1, ...."""
        first, end = (slice_end * self.windows_per_step // world_size for slice_end in (rank, rank + 1))
        before, after = self.windows_before(step), self.windows_before(step + 1)
        ends = np.cumsum(after - before)
        starts = np.concatenate([[0], np.cumsum(self.source_windows)])
        chosen = []
        for source, (start, stop) in enumerate(zip(ends - (after - before), ends, strict=True)):
            places = np.arange(max(first, start), min(end, stop), dtype=np.int64) - start + before[source]
            chosen.append(starts[source] + self._windows_of(source, places))
        return np.concatenate(chosen)

    def _windows_of(self, source: int, places: np.ndarray) -> np.ndarray:
        """The windows at ``places`` of a source's own order."""
        size = self.source_windows[source]
        epochs, offsets = np.divmod(places, size)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            offsets[of_epoch] = permute(offsets[of_epoch], size=size, seed=self.seed, epoch=int(epoch), source=source)
        return offsets


class MixedStream(TokenStream):
    """The streams of several sources end to end, each cut off behind its last whole window.

    So window w of all is at token w x length, as in a stream of one source.
    """

    def __init__(self, streams: list[TokenStream], *, window_length: int) -> None:
        self.vocab_size, self.dtype, self.files = streams[0].vocab_size, streams[0].dtype, None
        self._streams = streams
        self.source_windows = tuple(len(stream) // window_length for stream in streams)
        self._ends = [end * window_length for end in itertools.accumulate(self.source_windows)]
        self._starts = [0, *self._ends[:-1]]

    def notes(self) -> list[str]:
        """What is to be said of each source, with its folder."""
        return [
            f"{stream.files.folder if stream.files else number}: {note}"
            for number, stream in enumerate(self._streams)
            for note in stream.notes()
        ]

    def read(self, start: int, length: int) -> Tokens:
        """Tokens ``[start, start + length)``, which must lie in one source, in a new array."""
        source = bisect.bisect_right(self._ends, start)
        if not 0 <= start <= start + length <= self._ends[min(source, len(self._ends) - 1)]:
            raise IndexError(f"tokens [{start:,}, {start + length:,}) do not lie in one source of the mixture")
        return self._streams[source].read(start - self._starts[source], length)

    def shard_at(self, position: int) -> tuple[str, int]:
        """The shard that holds the token at ``position``, with its folder, and the token's index in it."""
        source = bisect.bisect_right(self._ends, position)
        stream = self._streams[source]
        name, offset = stream.shard_at(position - self._starts[source])
        return (f"{stream.files.folder}/{name}" if stream.files else name), offset
