"""Garbage collection between steps only, never within one.

By default Python collects on every rank at another moment, and all ranks wait for the one that does. A full collection
takes 0.6 s with torch, its compiler, Ray and MLflow loaded (two shared virtual cores, 2026-11-27), longer than a step
of the recipe should take on four H100s. Objects that exist after the first step stay for the whole run, so they are
examined only once.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """A context in which garbage is collected only by ``collect``, from its first call on.

    The settings from before are restored at the end, also after an error.
    """

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        self._is_frozen = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled, self._is_frozen = gc.isenabled(), False
        return self

    def collect(self) -> None:
        """Collect now. The first call exempts all remaining objects from later collections."""
        gc.collect()
        if not self._is_frozen:
            gc.disable()
            gc.freeze()
            self._is_frozen = True

    def __exit__(self, *_: object) -> None:
        if self._is_frozen:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()
