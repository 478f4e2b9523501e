"""The rules of Gopher for quality and repetition (Rae and others 2021, arXiv 2112.11446, appendix A.1, table A1).

A word is what stands between white space, as in the paper. A word of punctuation only does not count for the number and
the length of words. The characters of a repeated run of words are counted once for each time that it comes again, runs
that overlap a counted one left out, which is how the rule is read by those who published their code.
"""

from __future__ import annotations

import re
from collections import Counter

from pipeline.filters.words import Bounds, above, below, has_letter_or_digit, repeated, share

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


def broken_rule(text: str, bounds: Bounds) -> str | None:
    """The first rule that a text with at least one word breaks; None: it keeps them all."""
    words = text.split()
    return _quality(text, words, bounds) or _repeated_lines(text, bounds) or _repeated_words(text, words, bounds)


def _quality(text: str, words: list[str], bounds: Bounds) -> str | None:
    lengths = [len(word) for word in words if has_letter_or_digit(word)]
    mean = share(sum(lengths), len(lengths))
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    alphabetic = sum(any(character.isalpha() for character in word) for word in words)
    checks = (
        ("min_words", below(len(lengths), bounds["min_words"])),
        ("max_words", above(len(lengths), bounds["max_words"])),
        ("min_mean_word_length", below(mean, bounds["min_mean_word_length"])),
        ("max_mean_word_length", above(mean, bounds["max_mean_word_length"])),
        ("max_hashes_per_word", above(share(text.count("#"), len(words)), bounds["max_hashes_per_word"])),
        (
            "max_ellipses_per_word",
            above(share(text.count("...") + text.count("…"), len(words)), bounds["max_ellipses_per_word"]),
        ),
        ("max_bullet_lines", above(share(bullets, len(lines)), bounds["max_bullet_lines"])),
        ("max_ellipsis_lines", above(share(ellipses, len(lines)), bounds["max_ellipsis_lines"])),
        ("min_alphabetic_words", below(share(alphabetic, len(words)), bounds["min_alphabetic_words"])),
        ("min_stop_words", below(len(STOP_WORDS.intersection(words)), bounds["min_stop_words"])),
    )
    return next((name for name, is_broken in checks if is_broken), None)


def _repeated_lines(text: str, bounds: Bounds) -> str | None:
    for name, parts in (("paragraph", _PARAGRAPHS.split(text.strip())), ("line", _LINES.split(text))):
        count, characters = repeated(parts)
        if above(count / len(parts), bounds[f"max_repeated_{name}s"]):
            return f"max_repeated_{name}s"
        if above(characters / len(text), bounds[f"max_repeated_{name}_characters"]):
            return f"max_repeated_{name}_characters"
    return None


def _repeated_words(text: str, words: list[str], bounds: Bounds) -> str | None:
    for length in (2, 3, 4):
        runs = [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]
        if runs:
            run, count = Counter(runs).most_common(1)[0]
            if above(len(run) * count / len(text), bounds[f"max_top_{length}_gram"]):
                return f"max_top_{length}_gram"
    for length in range(5, 11):
        if above(_repeated_characters(words, length) / len(text), bounds[f"max_repeated_{length}_grams"]):
            return f"max_repeated_{length}_grams"
    return None


def _repeated_characters(words: list[str], length: int) -> int:
    """Characters, white space left out, of the runs of words that came before."""
    seen: set[str] = set()
    characters = start = 0
    while start + length <= len(words):
        run = "".join(words[start : start + length])
        if run in seen:
            characters += len(run)
            start += length
        else:
            seen.add(run)
            start += 1
    return characters
