"""Patterns of file names, the same on a disk, on the hub and in buckets.

``*``, ``?`` and ``[...]`` stay inside one folder, ``**`` goes through any number of them. A pattern that names a folder
means everything below it. A pattern is read part by part: the states of a name are the numbers of the parts that may
come next, so a folder that no state leads through need not be listed.
"""

from __future__ import annotations

import fnmatch
import glob
from dataclasses import dataclass

from pipeline.errors import UserError

States = frozenset[int]


def fixed_part(pattern: str) -> str:
    """The folders above the first wildcard, without a slash at the end; the whole of a pattern that has none."""
    parts = pattern.strip("/").split("/")
    for index, part in enumerate(parts):
        if glob.has_magic(part):
            return "/".join(parts[:index])
    return "/".join(parts)


def matches(name: str, pattern: str) -> bool:
    """Whether ``name`` matches the pattern or lies below a match; an empty pattern matches everything."""
    return Pattern.of(pattern).matches(name)


def is_hidden(part: str) -> bool:
    """Whether programs of this field pass over a file or folder of this name: .git, _SUCCESS, but not _year=2020."""
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


@dataclass(frozen=True)
class Pattern:
    """The parts of a pattern between its slashes."""

    parts: tuple[str, ...]

    @classmethod
    def of(cls, pattern: str) -> Pattern:
        """Raises UserError where ``**`` does not stand alone between slashes, since no two programs agree on that."""
        parts = tuple(pattern.strip("/").split("/")) if pattern.strip("/") else ()
        for part in parts:
            if "**" in part and part != "**":
                raise UserError(f"pattern {pattern}: ** must stand alone between slashes, as in **/*.jsonl")
        return cls(parts)

    @property
    def start(self) -> States:
        """The states before the first part of a name."""
        return self._with_skipped({0})

    def step(self, states: States, part: str, *, also_hidden: bool = True) -> States:
        """The states behind one more part of a name; none where nothing below it can match.

        also_hidden: if not, a hidden part is passed only where the pattern spells its first character.
        """
        found = set()
        for state in states:
            wanted = self.parts[state] if state < len(self.parts) else "**"
            if not also_hidden and is_hidden(part) and not wanted.startswith(part[0]):
                continue
            if wanted == "**":
                found |= {state, min(state + 1, len(self.parts))}
            elif fnmatch.fnmatchcase(part, wanted):
                found.add(state + 1)
        return self._with_skipped(found)

    def is_match(self, states: States) -> bool:
        """Whether a name with these states matches, or lies below a match."""
        return len(self.parts) in states

    def matches(self, name: str, *, also_hidden: bool = True) -> bool:
        """Whether a name matches or lies below a match."""
        states = self.start
        for part in name.split("/"):
            states = self.step(states, part, also_hidden=also_hidden)
        return self.is_match(states)

    def _with_skipped(self, states: set[int]) -> States:
        """``**`` may stand for no folder at all, but at the end of a pattern it stands for something."""
        for state in range(len(self.parts) - 1):
            if state in states and self.parts[state] == "**":
                states.add(state + 1)
        return frozenset(states)
