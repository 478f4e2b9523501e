"""The rules that documents pass before they are hashed and encoded: languages, groups by name, own ones, and masking.

A document leaves them changed, unchanged, or with the name of the first rule that it breaks. What they do is a function
of the text and of the settings alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.filters import c4, fineweb, gopher, languages
from pipeline.filters.personal_data import masked
from pipeline.filters.words import Bounds, first_broken

GROUPS: dict[str, ModuleType] = {"gopher": gopher, "c4": c4, "fineweb": fineweb}
LANGUAGE, LANGUAGE_SCORE = "language", "language_score"
"""Group and rule of the likeliest language of a document."""
OwnRule = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What documents must keep to; plain values, which can be sent to any worker."""

    groups: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    """Changed bounds: GROUP.NAME=NUMBER, or off for the number."""
    own: tuple[str, ...] = ()
    """Functions, PACKAGE.MODULE:FUNCTION, from a text to None or to the name of the rule that it breaks."""
    mask_personal_data: bool = False
    languages: tuple[str, ...] = ()
    """Codes of the languages that stay; none: all."""
    language_score: float = 0.65
    """Least score of the likeliest language."""

    def __post_init__(self) -> None:
        for name in self.groups:
            if name not in GROUPS:
                raise UserError(f"filters are {' '.join(self.groups)}; each must be one of {', '.join(GROUPS)}")
        for entry in self.bounds:
            _parsed(entry)
        if unknown := [code for code in self.languages if code not in languages.KNOWN]:
            raise UserError(
                f"languages has {' '.join(unknown)}, which names none; give codes such as en or de, of these: "
                f"{' '.join(sorted(languages.KNOWN))}"
            )

    def __bool__(self) -> bool:
        return bool(self.groups or self.own or self.mask_personal_data or self.languages)

    def require_usable(self) -> None:
        """Raise UserError for an own rule that cannot be imported, and where no language can be told."""
        if self.languages:
            languages.require_package()
        for path in self.own:
            own_rule(path)

    def apply(self, text: str) -> tuple[str, str | None]:
        """The text as it goes on, and the name of the rule that it breaks, with its group in front."""
        text = masked(text) if self.mask_personal_data else text
        for group, _, after, broken in self.steps(text):
            if broken:
                return after, f"{group}: {broken}"
            text = after
        return text, None

    def steps(self, text: str) -> Iterator[tuple[str, str, str, str | None]]:
        """Group, text before it and behind it, and the rule that the text breaks, one group after the other.

        The language is the first group, an own rule is a group of its own. ``text``: with personal data masked, if that
        is wanted.
        """
        if self.languages:
            yield LANGUAGE, text, text, self._broken_language(text)
        for name in self.groups:
            bounds = bounds_of(self, name)
            if name == "c4":
                after, broken = c4.kept_text(text, bounds)
            else:
                after, broken = text, first_broken(GROUPS[name].measured(text, bounds), bounds)
            yield name, text, after, broken
            text = after
        for path in self.own:
            yield path, text, text, own_rule(path)(text)

    def _broken_language(self, text: str) -> str | None:
        """The language of a text that goes, or which of those that stay it is too uncertain for."""
        language, score = languages.likeliest(text)
        if language not in self.languages:
            return language
        return f"{language} below {self.language_score:g}" if score < self.language_score else None


@functools.lru_cache(maxsize=64)
def bounds_of(rules: Rules, group: str) -> Bounds:
    """The bounds of a group as the settings have them."""
    changed = {name: value for place, name, value in map(_parsed, rules.bounds) if place == group}
    return {**GROUPS[group].BOUNDS, **changed}


def _parsed(entry: str) -> tuple[str, str, float | None]:
    place, _, written = entry.partition("=")
    group, _, name = place.partition(".")
    if group not in GROUPS or name not in GROUPS[group].BOUNDS:
        known = ", ".join(f"{group}.{name}" for group in GROUPS for name in GROUPS[group].BOUNDS)
        raise UserError(f"filter_bounds has {entry}, which names no bound; there are {known}")
    try:
        return group, name, None if written == "off" else float(written)
    except ValueError:
        raise UserError(f"filter_bounds has {entry}; give a number behind the =, or off") from None


@functools.cache
def own_rule(path: str) -> OwnRule:
    """The function that an import path names."""
    module, _, name = path.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"own rule {path} cannot be imported ({error}); give PACKAGE.MODULE:FUNCTION of a module on PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"own rule {path} is no function; give PACKAGE.MODULE:FUNCTION")
    return function


def filtered(
    arrays: Iterable[pa.Array],
    rules: Rules,
    dropped: Counter[str],
    keep: Callable[[npt.NDArray[np.bool_]], None] | None = None,
) -> Iterator[pa.Array]:
    """The documents that break no rule, as large_string arrays; the others are counted by rule.

    keep: is told of every array which of its documents are kept, before they are handed on.
    """
    for array in arrays:
        kept: list[str] = []
        is_kept = np.zeros(len(array), bool)
        for row, text in enumerate(array.to_pylist()):
            changed, broken = rules.apply(text)
            if broken is None and changed.strip():
                kept.append(changed)
                is_kept[row] = True
            else:
                dropped[broken or "nothing left"] += 1
        if keep:
            keep(is_kept)
        if kept:
            yield pa.array(kept, pa.large_string())
