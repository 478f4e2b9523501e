"""Splitting text into pretokens against a plain-Python splitter: every character, every trap at every block boundary.

The kernels look at 64 bytes at a time and carry bits from one block to the next, so whatever can go wrong is moved
across such a boundary byte by byte. The splitter itself is held against tiktoken and `tokenizers`.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.tokenizer import bpe
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import count_pretokens
from tests.conftest import ROOT
from tests.support.bpe_references import (
    BAD_BYTES,
    BOTH,
    EXPRESSIONS,
    NASTY,
    pretokens,
    tiktoken_matches,
    tiktoken_pretokens,
    tokenizers_pretokens,
)

BLOCK = 64
ALL_CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
# One of every kind and width; letters that contractions are made of; bytes that belong to no character.
TRAPS = [
    *[each.encode() for each in "asSlreR\u00e9\u017f漢\u0e33\U00020000"],
    *[each.encode() for each in "1½Ⅷ\U0001d7d7" + "'!´€\u0301\u200b\U0001f600"],
    *[each.encode() for each in " \t\n\r\x1c\x85\xa0\u2003\u3000"],
    *BAD_BYTES,
]
PADDING = [b"\xff", *[each.encode() for each in "a !1\né漢\u3000\U0001f600"]]


def padded(padding: bytes, length: int) -> bytes:
    """So many bytes of padding; where its characters do not fit exactly, "a" comes first."""
    return b"a" * (length % len(padding)) + padding * (length // len(padding))


def assert_cut(documents: Iterable[bytes], pattern: Pattern) -> None:
    """Each document by itself, and all of them counted one behind the other in memory."""
    documents = list(documents)
    expected = [pretokens(document, pattern) for document in documents]
    for document, parts in zip(documents, expected, strict=True):
        assert bpe.pretokenize(document, pattern) == parts, document
    assert_counted(documents, expected, pattern)


def assert_counted(documents: list[bytes], expected: list[list[bytes]], pattern: Pattern) -> None:
    data = pa.array(documents, pa.large_binary())
    texts = pa.Array.from_buffers(pa.large_string(), len(data), data.buffers())  # Arrow does not look
    counts = count_pretokens(texts, pattern=pattern).table
    found = dict(zip(counts["pretoken"].to_pylist(), counts["count"].to_pylist(), strict=True))
    assert found == Counter(itertools.chain.from_iterable(expected))


# --- the splitter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", BOTH)
def test_the_splitter_cuts_as_tiktoken_and_tokenizers_do(pattern: Pattern) -> None:
    chance = random.Random(pattern)
    for _ in range(4):
        texts = ["".join(chance.choices(NASTY, k=chance.randint(0, 9))) for _ in range(300)]
        ours = [pretokens(text.encode(), pattern) for text in texts]
        assert ours == tokenizers_pretokens(texts, EXPRESSIONS[pattern])
        assert ours == tiktoken_pretokens(texts, EXPRESSIONS[pattern])


@pytest.mark.parametrize("pattern", BOTH)
def test_the_splitter_loses_nothing(pattern: Pattern) -> None:
    # A stand-in that no branch of its pattern takes would vanish from the pretokens without a trace.
    data = "".join(map(chr, ALL_CODES[:0x3000])).encode() + b"\xff \xff"
    assert b"".join(pretokens(data, pattern)) == data


def test_the_long_s_and_no_other_character_ends_a_contraction_of_cl100k() -> None:
    contractions, _ = EXPRESSIONS["cl100k"].split("|[^", 1)
    frames = ["'{}", "'{}e", "'{}E", "'{}l", "'{}L", "'l{}", "'r{}", "'v{}", "'L{}", "'R{}", "'V{}"]
    text = "\n".join(frame.format(chr(code)) for code in ALL_CODES[:0x20000] for frame in frames)
    found = set(tiktoken_matches(contractions, text).replace("'", " '").split())
    cases = [itertools.product(*zip(pair, pair.upper(), strict=True)) for pair in ("ll", "re", "ve")]
    pairs = map("".join, itertools.chain.from_iterable(cases))
    assert found == {f"'{each}" for each in [*"sStTmMdD\u017f", *pairs]}
    assert bpe.pretokenize("'\u017fx".encode(), "cl100k") == ["'\u017f".encode(), b"x"]
    assert bpe.pretokenize("'\u017fx".encode(), "gpt2") == [b"'", "\u017fx".encode()]


# --- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world's  end\n", ["Hello", " world", "'s", " ", " end", "\n"]),
        ("a \n b\n\n  c  ", ["a", " \n", " b", "\n\n ", " c", "  "]),
        ("12345 678!\r\n", ["12345", " 678", "!", "\r\n"]),
        ("I'LL don't", ["I", "'", "LL", " don", "'t"]),
        ("x\u3000\u3000y", ["x", "\u3000", "\u3000", "y"]),
        ("", []),
    ],
)
def test_pretokens_of_gpt2_by_eye(text: str, expected: list[str]) -> None:
    assert [pretoken.decode() for pretoken in bpe.pretokenize(text.encode())] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world's  end\n", ["Hello", " world", "'s", " ", " end", "\n"]),
        ("a \n b\n\n  c  ", ["a", " \n", " b", "\n\n", " ", " c", "  "]),
        ("12345 678!\r\n", ["123", "45", " ", "678", "!\r\n"]),
        ("I'LL don't", ["I", "'LL", " don", "'t"]),
        ("(a\tb\xa0c'llama", ["(a", "\tb", "\xa0c", "'ll", "ama"]),
        (" \n ", [" \n", " "]),
        ("", []),
    ],
)
def test_pretokens_of_cl100k_by_eye(text: str, expected: list[str]) -> None:
    assert [pretoken.decode() for pretoken in bpe.pretokenize(text.encode(), "cl100k")] == expected


@pytest.mark.parametrize("pattern", BOTH)
def test_every_document_of_one_or_two_bytes(pattern: Pattern) -> None:
    assert_cut([b""] + [bytes([byte]) for byte in range(256)], pattern)
    assert_cut((bytes(pair) for pair in itertools.product(range(256), repeat=2)), pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_documents_of_three_bytes(pattern: Pattern) -> None:
    alphabet = b"asdSlLreTvEm1'! \t\n\r\x1c\x80\x85\xa0\x9f\xbf\xc2\xc3\xc5\xe1\xe2\xe3\xed\xef\xf0\xf4\xff"
    assert_cut((bytes(three) for three in itertools.product(alphabet, repeat=3)), pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_every_character(pattern: Pattern) -> None:
    # Letters, numbers and white space all lie below 0x40000; behind it every 61st will do here.
    codes = [code for code in ALL_CODES if code < 0x40000 or code % 61 == 0]
    text = b"".join(b"a%b1%b " % (each, each) for each in map(str.encode, map(chr, codes)))
    assert bpe.pretokenize(text, pattern) == pretokens(text, pattern)


@pytest.mark.parametrize("padding", PADDING, ids=ascii)
@pytest.mark.parametrize("pattern", BOTH)
def test_every_pair_of_traps_across_a_block_boundary(pattern: Pattern, padding: bytes) -> None:
    lengths = range(BLOCK - 4, BLOCK + 3)
    documents = (
        padded(padding, length) + first + second
        for length in lengths
        for first, second in itertools.product(TRAPS, repeat=2)
    )
    assert_cut(documents, pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_three_traps_across_boundaries_of_a_long_document(pattern: Pattern) -> None:
    # Long enough that no kernel finds all the pretokens in one go; every document begins elsewhere.
    chance = random.Random(pattern)
    triples = [b"".join(three) for three in itertools.product(TRAPS, repeat=3)]
    chance.shuffle(triples)
    documents = []
    for start in range(0, len(triples), 8000):
        parts = (
            padded(chance.choice(PADDING), chance.randint(BLOCK - 6, BLOCK)) + triple
            for triple in triples[start : start + 8000]
        )
        documents.append(b"".join(parts))
    assert_cut(documents, pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_white_space_of_every_length(pattern: Pattern) -> None:
    spaces = [b" ", b"\n", b"\t", b"\xc2\xa0", "\u2003".encode(), "\u3000".encode()]
    documents = (
        before + run * length + last + after
        for before in (b"", b"x")
        for run in spaces[:5:2]
        for length in range(2 * BLOCK // len(run) + 4)
        for last in (b"", *spaces)
        for after in (b"", b"a", b"1", b"'s", b"!", b"\xe2\x80")
    )
    assert_cut(documents, pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_contractions_across_a_block_boundary(pattern: Pattern) -> None:
    endings = [
        "s",
        "t",
        "d",
        "m",
        "re",
        "ve",
        "ll",
        "S",
        "T",
        "LL",
        "Re",
        "vE",
        "l",
        "r",
        "v",
        "L",
        "lr",
        "\u017f",
        "\u212a",
    ]
    contractions = [f"{before}'{each}" for before in ("", "'", " ", "n't") for each in endings]
    documents = (
        padded(padding, length) + contraction.encode() + after
        for padding in PADDING
        for length in range(BLOCK - 6, BLOCK + 2)
        for contraction in contractions
        for after in (b"", b"x")
    )
    assert_cut(documents, pattern)


@pytest.mark.parametrize("pattern", BOTH)
def test_characters_cut_off_by_the_end_of_a_document(pattern: Pattern) -> None:
    characters = [each.encode() for each in "é½´\xa0漢Ⅷ€\u2003\U00020000\U0001d7d7\U0001f600"]
    cut = [character[:length] for character in characters for length in range(1, len(character) + 1)]
    documents = (
        padded(padding, length) + ending
        for padding in (b"a", b" ", "漢".encode())
        for length in range(2 * BLOCK + 3)
        for ending in cut
    )
    assert_cut(documents, pattern)


@pytest.mark.parametrize("pattern", BOTH)
@pytest.mark.parametrize("unit", ["a", " ", "=", "1", "\n", "'", "é", "漢", "\u3000", "\xff"])
def test_long_runs_are_cut_as_short_ones(unit: str, pattern: Pattern) -> None:
    data = b"so " + unit.encode("latin-1" if unit == "\xff" else "utf-8") * 40_000 + b" it's"
    assert_cut([data, data[:-5], data[3:]], pattern)


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=300)
@given(data=st.lists(st.one_of(st.sampled_from(TRAPS), st.binary(max_size=4)), max_size=120).map(b"".join))
@example(data=b"a" * 63 + b"'")
@example(data=b" " * 63 + "\u2003".encode())
def test_any_bytes(pattern: Pattern, data: bytes) -> None:
    assert bpe.pretokenize(data, pattern) == pretokens(data, pattern)


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_a_short_fuzz_between_guard_pages() -> None:
    # tools/fuzz_bpe.py runs for as long as one likes; a read outside of the text ends its process.
    command = [sys.executable, str(ROOT / "tools" / "fuzz_bpe.py"), "600", "--cases", "120", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "120 cases" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
