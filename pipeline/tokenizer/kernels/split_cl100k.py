"""The numba loops that split text into pretokens by the pattern of cl100k and of Llama 3.

    (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*
    |\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+

The text is scanned character by character: what precedes a word depends on where the pretoken before it ended, which
the masks of split_gpt2.py do not show. The contract is the same: a bad byte is one character that is neither letter,
number nor white space, and no read goes past the end.
"""

# ruff: noqa: PLR0917, PLR1714  numba calls by position, and compiles comparisons better than sets

from __future__ import annotations

import numpy as np

from pipeline.tokenizer.kernels.cache import helper
from pipeline.tokenizer.kernels.memory import load_byte, load_word, put_64, trailing_zeros
from pipeline.tokenizer.kernels.split_gpt2 import LETTER_KIND, NUMBER_KIND, OTHER_KIND, SPACE_KIND, Scanner, character

EVERY_BYTE = np.uint64(0x0101010101010101)
HIGH_BITS = np.uint64(0x80) * EVERY_BYTE
LONG_S = 0xC5BF  # U+017F in UTF-8: without regard to case it is an s


@helper
def ascii_letters_end(text: int, position: int, end: int) -> int:
    """Where the ASCII letters from position on stop, as far as whole words of 8 bytes tell; most words need one look.

    Each byte, in lower case and without its top bit, plus 0x1f reaches 0x80 from "a" on, plus 0x05 beyond "z".
    """
    while position + 8 <= end:
        word = load_word(text + position)
        lower = (word | np.uint64(0x20) * EVERY_BYTE) & ~HIGH_BITS
        is_letter = (lower + np.uint64(0x1F) * EVERY_BYTE) & ~(lower + np.uint64(0x05) * EVERY_BYTE) & ~word
        letters = trailing_zeros(~is_letter & HIGH_BITS) >> 3
        position += letters
        if letters < 8:
            break
    return position


@helper
def run_end(text: int, position: int, end: int, kind: int, classes: int, most: int) -> int:
    """Where the run of characters of one kind stops, after at most so many of them."""
    while position < end and most > 0:
        found = character(text, position, end, classes)
        if found & 3 != kind:
            break
        position += found >> 2
        most -= 1
    return position


@helper
def newlines_end(text: int, position: int, end: int) -> int:
    """Where the run of \\r and \\n stops."""
    while position < end and (load_byte(text + position) == 0x0A or load_byte(text + position) == 0x0D):
        position += 1
    return position


@helper
def white_end(text: int, position: int, end: int, classes: int) -> int:
    """End of a pretoken of white space: after its last newline if there is one.

    Otherwise all of it at the end of the text, and elsewhere all but the last of two or more characters.
    """
    last, stop, behind_newline = position, position, position
    while stop < end:
        found = character(text, stop, end, classes)
        if found & 3 != SPACE_KIND:
            break
        last = stop
        stop += found >> 2
        if load_byte(text + last) == 0x0A or load_byte(text + last) == 0x0D:
            behind_newline = stop
    if behind_newline > position:
        return behind_newline
    return stop if stop == end or last == position else last


@helper
def contraction_end(text: int, position: int, end: int) -> int:
    """End of 's 't 'd 'm 're 've 'll, in either case, at an apostrophe; or the position itself."""
    if position + 1 >= end:
        return position
    second = load_byte(text + position + 1) | 0x20
    if second == 0x73 or second == 0x74 or second == 0x64 or second == 0x6D:
        return position + 2
    if position + 2 >= end:
        return position
    if load_byte(text + position + 1) << 8 | load_byte(text + position + 2) == LONG_S:
        return position + 3
    third = load_byte(text + position + 2) | 0x20
    if (second == 0x6C and third == 0x6C) or ((second == 0x72 or second == 0x76) and third == 0x65):
        return position + 3
    return position


@helper
def letters_end(text: int, position: int, end: int, classes: int) -> int:
    """Where the run of letters stops."""
    return run_end(text, ascii_letters_end(text, position, end), end, LETTER_KIND, classes, end)


@helper
def pretoken_end(text: int, position: int, end: int, classes: int) -> int:
    """End of the pretoken that starts at position < end."""
    first = load_byte(text + position)
    if first == 0x27:
        stop = contraction_end(text, position, end)
        if stop > position:
            return stop
    found = character(text, position, end, classes)
    kind, behind = found & 3, position + (found >> 2)
    if kind == LETTER_KIND:
        return letters_end(text, behind, end, classes)
    if kind == NUMBER_KIND:
        return run_end(text, behind, end, NUMBER_KIND, classes, 2)
    next_kind = character(text, behind, end, classes) & 3 if behind < end else SPACE_KIND
    if next_kind == LETTER_KIND and first != 0x0A and first != 0x0D:
        return letters_end(text, behind, end, classes)
    if kind == OTHER_KIND or (first == 0x20 and next_kind == OTHER_KIND):
        return newlines_end(text, run_end(text, behind, end, OTHER_KIND, classes, end), end)
    return white_end(text, position, end, classes)


@helper
def scan_cl100k(text: int, position: int, end: int, scanner: Scanner) -> int:
    """Same arguments and result as split_gpt2.scan_gpt2, but readable_end is not needed."""
    count = 0
    while position < end and count < scanner.max_pretokens:
        position = pretoken_end(text, position, end, scanner.classes)
        put_64(scanner.ends, count, position)
        count += 1
    return count
