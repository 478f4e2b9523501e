"""Words as the decontamination of GPT-3 has them (Brown and others 2020, appendix C): lower case, between white space,
without punctuation.

Beyond the paper: accents and other combining marks make no difference either, and in scripts without blanks every
character is a word. Digits count, so that questions which differ in a number are different ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.deduplication.characters import character_table
from pipeline.deduplication.kernels.words import ALONE, DIGIT, MARK, SEPARATOR, TABLE_SIZE
from pipeline.deduplication.shingles import HashLists, shingle_hashes, word_hashes
from pipeline.tokenizer.unicode_table import SPACE, character_classes

GRAM_WORDS = 13
"""Words of a run that a document and a question must share."""


@functools.cache
def plain_word_table() -> npt.NDArray[np.int32]:
    """What every character is in a word, as ``character_table``, with digits as they are and punctuation as nothing."""
    table = character_table().copy()
    classes = character_classes()[:TABLE_SIZE]
    points = np.arange(TABLE_SIZE, dtype=np.int32)
    table[table == DIGIT] = points[table == DIGIT]
    table[(table == SEPARATOR) & (classes != SPACE)] = MARK
    return table


def gram_hashes(texts: Any) -> HashLists:
    """Hashes of all runs of 13 words of every document; shorter ones have none. ``texts``: as of ``word_hashes``."""
    return shingle_hashes(word_hashes(texts, plain_word_table()), GRAM_WORDS, only_whole=True)


def plain_words(text: str) -> Iterator[str]:
    """The words of a text, one for each hash that ``word_hashes`` gives with the same table."""
    table = plain_word_table()
    word: list[str] = []
    for character in text:
        point = ord(character)
        entry = int(table[point]) if point < TABLE_SIZE else point + ALONE
        if entry == MARK:
            continue
        if word and (entry == SEPARATOR or entry >= ALONE):
            yield "".join(word)
            word = []
        if entry >= ALONE:
            yield chr(entry - ALONE)
        elif entry != SEPARATOR:
            word.append(chr(entry))
    if word:
        yield "".join(word)
