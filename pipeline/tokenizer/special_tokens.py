"""Special tokens in a text: which of them a caller allows or forbids, where they are, and where a text may be cut."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.errors import UserError

Names: TypeAlias = Collection[str] | Literal["all"]
"""Special tokens by their text, or all of them."""

_PART_CHARS = 100_000
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")  # no pretoken of either pattern goes on from a letter or digit to these


@dataclass(frozen=True)
class Choice:
    """The special tokens that are recognized in a text, and those that must not occur in it."""

    allowed: Mapping[str, int]
    forbidden: Collection[str]

    def __bool__(self) -> bool:
        return bool(self.allowed or self.forbidden)

    @property
    def names(self) -> list[str]:
        """All that are looked for, the longest first."""
        return sorted({*self.allowed, *self.forbidden}, key=lambda name: (-len(name), name))

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Stretches of ordinary text (None) and special tokens (their id), in order.

        Raises UserError for a special token that must not occur.
        """
        for part in re.split(f"({'|'.join(map(re.escape, self.names))})", text):
            if part in self.forbidden:
                raise UserError(
                    f"the text holds the special token {part!r}; name it in allowed_special to get its id, or leave it "
                    "out of disallowed_special to have it encoded as ordinary text"
                )
            if part:
                yield part, self.allowed.get(part)


class SpecialTokens:
    """The special tokens of a tokenizer."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids

    def choose(self, allowed: Names, forbidden: Names) -> Choice:
        """What these arguments of ``Tokenizer.encode`` mean; UserError for a name that is no special token."""
        if not allowed and not forbidden:
            return Choice({}, ())
        allowed_ids = {name: self._ids[name] for name in self._known("allowed_special", allowed)}
        forbidden_names = self._known("disallowed_special", forbidden)
        if forbidden == "all":
            forbidden_names -= allowed_ids.keys()
        elif both := sorted(forbidden_names & allowed_ids.keys()):
            raise UserError(f"{both[0]!r} is in allowed_special and in disallowed_special; leave it out of one of them")
        return Choice(allowed_ids, forbidden_names)

    def _known(self, argument: str, names: Names) -> set[str]:
        if isinstance(names, str) and names != "all":
            raise UserError(f"{argument} is the str {names!r}; give a set of special tokens, or all")
        chosen = set(self._ids) if names == "all" else set(names)
        if unknown := sorted(chosen - self._ids.keys()):
            raise UserError(f"{argument} names {unknown[0]!r}, but the special tokens are {sorted(self._ids)}")
        return chosen


def safe_parts(texts: Iterable[str], special_tokens: Collection[str]) -> Iterator[str]:
    """The texts joined and cut where neither a pretoken nor a special token goes across, some 100 kB at a time.

    A cut lies between a letter or digit and a blank or newline: no pretoken of GPT-2's or cl100k's pattern holds the
    two side by side, and none looks behind itself.
    """
    spaced = [name for name in special_tokens if _CUT.search(name)]
    margin = max(map(len, spaced), default=0)
    waiting: list[str] = []
    num_chars, wanted = 0, _PART_CHARS
    for text in texts:
        waiting.append(text)
        num_chars += len(text)
        if num_chars < wanted:
            continue
        joined = "".join(waiting)
        cut = _last_cut(joined, spaced, margin)
        if cut:
            yield joined[:cut]
        waiting, num_chars = [joined[cut:]], len(joined) - cut
        wanted = max(_PART_CHARS, 2 * num_chars)
    if rest := "".join(waiting):
        yield rest


def _last_cut(text: str, spaced: Collection[str], margin: int) -> int:
    """The last place where ``text``, which goes on, may be cut; 0 where there is none.

    spaced: special tokens that hold such a place, ``margin`` characters at most; the last ones may begin one.
    """
    stop = len(text) - margin
    while stop > 0:
        start = max(0, stop - _PART_CHARS)
        for found in reversed(list(_CUT.finditer(text, start, stop))):
            cut = found.start()
            around = text[max(0, cut - margin) : cut + margin]
            if not any(_is_across(around, name, min(cut, margin)) for name in spaced):
                return cut
        stop = start
    return 0


def _is_across(text: str, name: str, cut: int) -> bool:
    """Whether an occurrence of ``name`` begins before ``cut`` and ends behind it."""
    return 0 <= text.find(name, max(0, cut - len(name) + 1)) < cut
