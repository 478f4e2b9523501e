"""The rules of C4 (Raffel and others 2020, section 2.2), but for its list of bad words: lines go, and some documents.

A line stays if it ends in a terminal mark, has three words and none of 1,000 characters, and names neither Javascript
nor policies. A document goes where it holds lorem ipsum or a curly bracket in such a line, or where fewer than five
sentences stay. Marks of citations are taken out of the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.filters.words import Bounds, above, below

BOUNDS: dict[str, float | None] = {
    "min_sentences": 5,
    "min_words_per_line": 3,
    "max_word_length": 1000,
    "terminal_marks": 1,
    "citations": 1,
    "lorem_ipsum": 1,
    "curly_bracket": 1,
    "javascript": 1,
    "policies": 1,
}
"""Those of 1 are switches."""

_ENDS = (".", "?", "!", '"', "'")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE = re.compile(r"[.?!…]+[\"'”’)\]]*(?=\s|$)")


def kept_text(text: str, bounds: Bounds) -> tuple[str, str | None]:
    """The lines that stay, and the rule by which the document goes, if one does."""
    kept: list[str] = []
    for whole in text.splitlines():
        line = whole.strip()
        words = line.split()
        if any(above(len(word), bounds["max_word_length"]) for word in words):
            continue
        if bounds["citations"]:
            line = _CITATION.sub("", line)
        if bounds["terminal_marks"] and (not line.endswith(_ENDS) or line.endswith("...")):
            continue
        if below(len(words), bounds["min_words_per_line"]):
            continue
        lower = line.lower()
        if bounds["lorem_ipsum"] and "lorem ipsum" in lower:
            return "", "lorem_ipsum"
        if bounds["javascript"] and "javascript" in lower:
            continue
        if bounds["curly_bracket"] and "{" in line:
            return "", "curly_bracket"
        if bounds["policies"] and any(policy in lower for policy in _POLICIES):
            continue
        kept.append(line)
    is_short = below(sum(map(sentences, kept)), bounds["min_sentences"])
    return "\n".join(kept).strip(), "min_sentences" if is_short else None


def measured(text: str, bounds: Bounds) -> Iterator[tuple[str, float]]:
    """How many sentences stay of a text, unless it goes for another reason."""
    kept, broken = kept_text(text, {**bounds, "min_sentences": None})
    if broken is None:
        yield "min_sentences", sum(map(sentences, kept.split("\n"))) if kept else 0


def sentences(line: str) -> int:
    """How many sentences a line has: marks of their end before white space, and one more for what stands behind."""
    ends = [match.end() for match in _SENTENCE.finditer(line)]
    return len(ends) + (not ends or bool(line[ends[-1] :].strip()))
