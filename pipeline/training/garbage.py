"""When Python looks for cycles of objects that nothing reaches: between steps, never within one.

Left alone it looks on every rank at another moment, and all wait for the one that does. A full look takes 0.6 s beside
torch, its compiler, Ray and MLflow (two shared virtual cores, 2026-11-27), more than a step of the recipe is to take on
four H100s. What is there after the first steps stays for the whole run and is looked at once.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """A context in which cycles are collected where ``collect`` is called and, from its first call on, nowhere else.

    What was set before is set again at the end, also after an error.
    """

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        self._is_frozen = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled, self._is_frozen = gc.isenabled(), False
        return self

    def collect(self) -> None:
        """Collect now. The first call exempts all objects that are left from every later search."""
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
