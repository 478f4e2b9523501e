"""Patterns of file names on the hub and in buckets.

``*``, ``?`` and ``[...]`` stay inside one folder, ``**`` goes through any number of them, as in local patterns.
A pattern that names a folder means everything below it.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence


def fixed_part(pattern: str) -> str:
    """The folders above the first wildcard, without a slash at the end; the whole of a pattern that has none."""
    parts = pattern.strip("/").split("/")
    for index, part in enumerate(parts):
        if glob.has_magic(part):
            return "/".join(parts[:index])
    return "/".join(parts)


def matches(name: str, pattern: str) -> bool:
    """Whether ``name`` matches the pattern or lies below a match; an empty pattern matches everything."""
    pattern = pattern.strip("/")
    return not pattern or _match(name.split("/"), pattern.split("/"))


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_match(names[index:], patterns[1:]) for index in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and _match(names[1:], patterns[1:])
