"""What several groups of rules count: words, lines, and elements that came before."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Bounds: TypeAlias = Mapping[str, float | None]
"""Bound of a rule -> its value; None switches the rule off."""

TERMINAL = (
    ".",
    "?",
    "!",
    "…",
    "‼",
    "‽",
    "⁇",
    "⁈",
    "⁉",
    "。",
    "！",
    "？",
    "．",
    "｡",
    "।",
    "॥",
    "۔",
    "؟",
    "։",
    "።",
    "፧",
    "፨",
    "။",
    "៕",
)
"""Signs that end a sentence, in several scripts."""


def has_letter(word: str) -> bool:
    """Whether a word has a letter."""
    return any(character.isalpha() for character in word)


def has_letter_or_digit(word: str) -> bool:
    """Whether a word is more than punctuation and symbols."""
    return word.isalnum() or any(unicodedata.category(character)[0] in "LNM" for character in word)


def share(part: float, whole: float) -> float:
    """A part of a whole, 0 of nothing."""
    return part / whole if whole else 0.0


def above(value: float, bound: float | None) -> bool:
    """Whether a rule with a largest value is broken."""
    return bound is not None and value > bound


def below(value: float, bound: float | None) -> bool:
    """Whether a rule with a smallest value is broken."""
    return bound is not None and value < bound


def first_broken(measured: Iterable[tuple[str, float]], bounds: Bounds) -> str | None:
    """The first rule whose bound a measured value breaks: rules are named max_ or min_; None: it keeps them all."""
    for name, value in measured:
        if (above if name.startswith("max_") else below)(value, bounds[name]):
            return name
    return None


def repeated(elements: Iterable[str]) -> tuple[int, int]:
    """How many elements came before, and how many characters they have together."""
    seen: set[str] = set()
    count = characters = 0
    for element in elements:
        if element in seen:
            count += 1
            characters += len(element)
        else:
            seen.add(element)
    return count, characters
