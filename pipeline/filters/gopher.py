"""The rules of Gopher for quality and repetition (Rae and others 2021, arXiv 2112.11446, appendix A.1, table A1).

A word is what stands between white space, as in the paper. A word of punctuation only does not count for the number and
the length of words. The characters of a repeated run of words are counted once for each time that it comes again, runs
that overlap a counted one left out, which is how the rule is read by those who published their code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.filters.kernels import repetition as kernels
from pipeline.filters.words import Bounds, has_letter, has_letter_or_digit, repeated, share

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BOUNDS: dict[str, float | None] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3,
    "max_mean_word_length": 10,
    "max_hashes_per_word": 0.1,
    "max_ellipses_per_word": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_repeated_paragraphs": 0.3,
    "max_repeated_paragraph_characters": 0.2,
    "max_repeated_lines": 0.3,
    "max_repeated_line_characters": 0.2,
    **{f"max_top_{length}_gram": bound for length, bound in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"max_repeated_{length}_grams": round(0.2 - 0.01 * length, 2) for length in range(5, 11)},
}

_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")


def measured(text: str, bounds: Bounds) -> Iterator[tuple[str, float]]:
    """What each rule measures of a text with at least one word, one after the other, as far as it is asked for."""
    del bounds
    words = text.split()
    yield from _quality(text, words)
    yield from _repeated_lines(text)
    yield from _repeated_words(text, words)


def _quality(text: str, words: list[str]) -> Iterator[tuple[str, float]]:
    lengths = [len(word) for word in words if has_letter_or_digit(word)]
    yield "min_words", len(lengths)
    yield "max_words", len(lengths)
    mean = share(sum(lengths), len(lengths))
    yield "min_mean_word_length", mean
    yield "max_mean_word_length", mean
    yield "max_hashes_per_word", share(text.count("#"), len(words))
    yield "max_ellipses_per_word", share(text.count("...") + text.count("…"), len(words))
    lines = text.splitlines()
    yield "max_bullet_lines", share(sum(line.lstrip().startswith(("•", "-")) for line in lines), len(lines))
    yield "max_ellipsis_lines", share(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines))
    yield "min_alphabetic_words", share(sum(word.isalpha() or has_letter(word) for word in words), len(words))
    yield "min_stop_words", len(STOP_WORDS.intersection(words))


def _repeated_lines(text: str) -> Iterator[tuple[str, float]]:
    for name, pattern, content in (("paragraph", _PARAGRAPHS, text.strip()), ("line", _LINES, text)):
        parts = pattern.split(content)
        count, characters = repeated(parts)
        yield f"max_repeated_{name}s", count / len(parts)
        yield f"max_repeated_{name}_characters", characters / len(text)


def _repeated_words(text: str, words: list[str]) -> Iterator[tuple[str, float]]:
    numbers: dict[str, int] = {}
    own: Any = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    characters: Any = np.array([len(word) for word in words], np.int64)
    table: Any = np.empty(1 << (2 * len(words)).bit_length(), np.int64)
    counts: Any = np.empty(len(table) + 1, np.int64)
    for length in (2, 3, 4):
        first = kernels.most_frequent(own, length, table, counts)
        if first >= 0:
            run = int(characters[first : first + length].sum()) + length - 1  # with the blanks between the words
            yield f"max_top_{length}_gram", run * int(counts[-1]) / len(text)
    for length in range(5, 11):
        yield f"max_repeated_{length}_grams", kernels.repeated_characters(own, characters, length, table) / len(text)
