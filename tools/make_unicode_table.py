"""Write pipeline/tokenizer/unicode_table.py: what GPT-2's pattern calls letter, number and white space, as tiktoken
has it.

The classes come from tiktoken itself: a tokenizer whose vocabulary is the 256 bytes and whose pattern is one class
returns exactly the characters of that class. Run it again only to move to another Unicode version, and then know that
files tokenized before and after differ wherever the new letters occur: ``python tools/make_unicode_table.py 16.0.0``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiktoken

OUTPUT = Path(__file__).resolve().parents[1] / "pipeline" / "tokenizer" / "unicode_table.py"
CLASSES = {"LETTERS": r"\p{L}", "NUMBERS": r"\p{N}", "WHITESPACE": r"\s"}
LINE_LENGTH = 116

HEADER = '''"""Letters, numbers and white space of Unicode {version}, frozen: a text has the same tokens for ever.

Equal to what tiktoken {tiktoken} knows as \\\\p{{L}}, \\\\p{{N}} and \\\\s: {letters:,}, {numbers:,} and {whitespace}
code points. Python's own tables differ from one Python to the next. Written by tools/make_unicode_table.py: do not edit
this file.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

UNICODE_VERSION = "{version}"
NUM_CODE_POINTS = 0x110000
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3


@functools.cache
def character_classes() -> npt.NDArray[np.uint8]:
    """OTHER, LETTER, NUMBER or SPACE for every code point: uint8 of NUM_CODE_POINTS, read-only, 1.1 MB."""
    classes = np.full(NUM_CODE_POINTS, OTHER, np.uint8)
    for kind, ranges in ((LETTER, LETTERS), (NUMBER, NUMBERS), (SPACE, WHITESPACE)):
        for entry in ranges.split():
            first, _, last = entry.partition("-")
            classes[int(first, 16) : int(last or first, 16) + 1] = kind
    classes.flags.writeable = False
    return classes


# Code points in hexadecimal; "41-5a" is a range with both ends.
'''


def members(pattern: str) -> list[int]:
    """Code points, in order, that match a pattern of one character."""
    encoding = tiktoken.Encoding(
        "classes", pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    every_character = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return [ord(character) for character in bytes(encoding.encode_ordinary(every_character)).decode()]


def ranges(codes: list[int]) -> list[str]:
    """Runs of consecutive code points as "41-5a", single ones as "aa"."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return [f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in runs]


def constant(name: str, entries: list[str]) -> str:
    """A string constant, wrapped."""
    lines, line = [], ""
    for entry in entries:
        if line and len(line) + 1 + len(entry) > LINE_LENGTH:
            lines.append(line)
            line = ""
        line = f"{line} {entry}".strip()
    return "\n".join([f'{name} = """', *lines, line, '"""']) + "\n"


def main(version: str) -> None:
    """Write the table; version names the Unicode version of the installed tiktoken (its regex-syntax crate)."""
    codes = {name: members(pattern) for name, pattern in CLASSES.items()}
    counts = {name.lower(): len(found) for name, found in codes.items()}
    text = HEADER.format(version=version, tiktoken=tiktoken.__version__, **counts)
    text += "\n".join(constant(name, ranges(found)) for name, found in codes.items())
    OUTPUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
