"""Texts with copies that are changed in part, and what their words are, in plain Python."""

from __future__ import annotations

import functools
import random
import string
import unicodedata

from pipeline.tokenizer.unicode_table import LETTER, NUMBER, character_classes

ALONE = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF)]
ALONE += [(0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D)]


@functools.cache
def _kind(character: str) -> str:
    point = ord(character)
    if point >= 0x20000:
        return "alone"
    if character_classes()[point] == NUMBER:
        return "digit"
    if character_classes()[point] == LETTER:
        return "alone" if any(first <= point <= last for first, last in ALONE) else "letter"
    return "mark" if unicodedata.category(character) in {"Mn", "Mc", "Me"} and point >= 0x300 else "between"


def words_of(text: str) -> list[str]:
    """Words without case, accents and punctuation, every run of digits a 0; characters of some scripts alone."""
    words, word, previous = [], "", ""
    for character in text:
        kind = _kind(character)
        if kind == "mark" or (kind == "digit" and previous == "digit"):
            continue
        if kind in {"between", "alone"} and word:
            words.append(word)
            word = ""
        if kind == "alone":
            words.append(unicodedata.normalize("NFD", character)[0])
        elif kind == "digit":
            word += "0"
        elif kind == "letter":
            lower = unicodedata.normalize("NFD", character).lower()
            word += unicodedata.normalize("NFD", lower)[0]
        previous = kind
    return [*words, word] if word else words


def planted(seed: int, similarity: float, num_words: int) -> tuple[str, str]:
    """A text of its own words, and a copy whose shingles of five words have about this Jaccard similarity.

    Of two texts with n shingles each, of which m are common, it is m / (2n - m). The copy keeps one run of words and
    has others behind it, so that m is n less the words that differ.
    """
    choose = random.Random(seed)

    def new_word() -> str:
        return "".join(choose.choices(string.ascii_lowercase, k=choose.randrange(3, 10)))

    words = [new_word() for _ in range(num_words)]
    shingles = num_words - 4
    common = round(2 * similarity * shingles / (1 + similarity))
    copy = words[: common + 4] + [new_word() for _ in range(shingles - common)]
    return " ".join(words), " ".join(copy)
