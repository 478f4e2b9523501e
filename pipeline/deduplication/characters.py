"""What every character is in the words that are compared: a letter without case and accents, one sign for digits, or
something between words.

Letters, digits and the rest are those of the tokenizer's frozen Unicode table; lower case and decomposition are
Python's, whose answers for characters that exist do not change (Unicode's stability policy).
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import numpy.typing as npt

from pipeline.deduplication.kernels.words import ALONE, DIGIT, MARK, SEPARATOR, TABLE_SIZE
from pipeline.tokenizer.unicode_table import LETTER, NUMBER, character_classes

_ALONE = (  # scripts without blanks between words: every character is a word
    *(range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800), range(0x3041, 0x3100)),
    *(range(0x31F0, 0x3200), range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00)),
    range(0xFF66, 0xFF9E),
)
_UNCHANGED = (range(0x3400, 0xA000), range(0xAC00, 0xD7A4))  # Han, Hangul: neither case nor accents


@functools.cache
def character_table() -> npt.NDArray[np.int32]:
    """For every code point below TABLE_SIZE a character, SEPARATOR, MARK or DIGIT: (TABLE_SIZE,) int32.

    ALONE is added to a character that is a word by itself.
    """
    classes = character_classes()[:TABLE_SIZE]
    points = np.arange(TABLE_SIZE, dtype=np.int32)
    table = np.where(classes == LETTER, points, np.where(classes == NUMBER, DIGIT, SEPARATOR)).astype(np.int32)
    for point in np.flatnonzero(classes == LETTER).tolist():
        if not any(point in block for block in _UNCHANGED):
            table[point] = _folded(chr(point))
    for point in range(0x300, TABLE_SIZE):
        if table[point] == SEPARATOR and unicodedata.category(chr(point))[0] == "M":
            table[point] = MARK
    for block in _ALONE:
        part = table[block.start : block.stop]
        part[part > DIGIT] += ALONE
    return table


def _folded(character: str) -> int:
    """The code point of a letter in lower case without accents; of a ligature, that of its first letter."""
    return ord(unicodedata.normalize("NFD", unicodedata.normalize("NFD", character).lower())[0])
