"""Where every rank is, known on every rank: through the store that the process group met at, beside the collectives.

A rank that waits in a collective goes on to say so; one whose process or machine stands still falls silent. That is
what tells them apart when nothing moves.
"""

from __future__ import annotations

import json
import threading
import time

import torch.distributed as dist

_SECONDS_BETWEEN = 5.0
_END_SECONDS = 2.0


class Heartbeats:
    """Tells the store where this rank is, and reads where the others are, in a thread of its own.

    The store belongs to one of the ranks: where that one stands still, the thread hangs, and what was read last stays.

    Args:
        store: of the process group; operations go through a connection of their own.
        seconds: between two beats.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, seconds: float = _SECONDS_BETWEEN) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        self.place = "starting"
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch does not declare it
        self._seen: dict[int, tuple[int, str, float]] = {}  # rank: number of its beat, its place, when it was new here
        self._written = 0.0  # when the store last answered
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._written = time.monotonic()
        self._seen = {rank: (-1, "starting", time.monotonic()) for rank in range(self.world_size)}
        self._over.clear()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; does not wait long for a store that hangs."""
        self._over.set()
        if self._thread is not None:  # in the middle of a question torch would print a page when the store ends
            self._thread.join(_END_SECONDS)

    def describe(self) -> str:
        """The other ranks, for the end of a sentence: those that are silent, else where each of them waits."""
        now = time.monotonic()
        if now - self._written > 4 * self.seconds:
            return "; the ranks' common store, with rank 0, does not answer"
        others = {rank: seen for rank, seen in sorted(self._seen.items()) if rank != self.rank}
        silent = {rank: now - since for rank, (_, _, since) in others.items() if now - since > 4 * self.seconds}
        if silent:
            return "; " + ", ".join(f"rank {rank} has been silent for {age:.0f} s" for rank, age in silent.items())
        return "; " + ", ".join(f"rank {rank}: {place}" for rank, (_, place, _) in others.items()) if others else ""

    def _beat(self) -> None:
        number = 0
        try:
            while True:
                self._store.set(_key(self.rank), json.dumps([number, self.place]))
                self._look()
                number, self._written = number + 1, time.monotonic()
                if self._over.wait(self.seconds):
                    return
        except RuntimeError:  # the store is gone, and with it the run
            return

    def _look(self) -> None:
        for rank in range(self.world_size):
            if rank == self.rank or not self._store.check([_key(rank)]):
                continue
            number, place = json.loads(self._store.get(_key(rank)))
            if number != self._seen[rank][0]:
                self._seen[rank] = number, place, time.monotonic()


def _key(rank: int) -> str:
    return f"heartbeats/{rank}"
