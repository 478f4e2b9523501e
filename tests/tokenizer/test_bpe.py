"""Encoding and decoding against tiktoken and a slow splitter: real text, every character, bad bytes, Arrow layouts."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tokenizer import bpe, unicode_table
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.kernels import merge_short
from pipeline.tokenizer.patterns import MAX_TOKENS, PATTERNS
from pipeline.tokenizer.training import count_pretokens
from tests.support.bpe_references import (
    GPT2_PATTERN,
    NASTY,
    documents,
    gpt2,
    gpt2_tiktoken,
    pretokens,
    tiktoken_class,
)

nasty_text = st.lists(st.sampled_from(NASTY), max_size=40).map("".join)
BYTE_TOKENS = [bytes([byte]) for byte in range(256)]
END = "<|endoftext|>"


def tiny_tokenizer() -> Tokenizer:
    """The bytes, "ab", "abab" and the end of text."""
    return Tokenizer([*BYTE_TOKENS, b"ab", b"abab", END.encode()], [(97, 98), (256, 256)], {END: 258})


def split(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


# --- equal to tiktoken -----------------------------------------------------------------------------------------------


def test_real_text_has_the_ids_of_tiktoken() -> None:
    texts = documents(1000)
    ids, offsets = gpt2().encode_batch(texts)
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64
    assert split(ids, offsets) == gpt2_tiktoken().encode_ordinary_batch(texts, num_threads=1)
    assert [gpt2().decode(each) for each in split(ids, offsets)] == texts


@settings(max_examples=1500)
@given(nasty_text)
@example("  \n \xa0x")
@example("a \u2003b")
@example("'re're 's 'll've !'s 'sup ''d")
@example(" ")
@example("\u3000\u3000")
def test_nasty_text_has_the_ids_of_tiktoken(text: str) -> None:
    ids = gpt2().encode(text)
    assert ids == gpt2_tiktoken().encode_ordinary(text)
    assert gpt2().decode(ids) == text


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_has_the_ids_of_tiktoken(text: str) -> None:
    assert gpt2().encode(text) == gpt2_tiktoken().encode_ordinary(text)


@settings(max_examples=200)
@given(st.lists(nasty_text, max_size=12))
def test_documents_do_not_see_their_neighbours(texts: list[str]) -> None:
    assert split(*gpt2().encode_batch(texts)) == [gpt2_tiktoken().encode_ordinary(text) for text in texts]


@settings(max_examples=300)
@given(st.text(alphabet="abe \u00e9", min_size=100, max_size=280), st.integers(1, 3))
def test_pretokens_around_every_limit_of_length(text: str, repeats: int) -> None:
    # 15 bytes: short key; 128: heap; 256: not kept. Twice, so that the second time comes out of the table.
    word = text.replace(" ", "") * repeats
    for length in (7, 8, 9, 15, 16, 17, 127, 128, 129, 255, 256, 257):
        expected = gpt2_tiktoken().encode_ordinary(word[:length])
        assert gpt2().encode(word[:length]) == expected
        assert gpt2().encode(word[:length]) == expected


@pytest.mark.parametrize("unit", ["a", "=", "ab", "漢", "1"])
def test_long_runs(unit: str) -> None:
    run = unit * (1_000_000 // len(unit.encode()))
    text = f"so {run} it is" if unit != "=" else run[:100_000]
    ids = gpt2().encode(text)
    assert gpt2().decode(ids) == text
    pretoken = run[:50_000].encode()
    assert gpt2().encode_bytes(pretoken) == gpt2_tiktoken()._encode_single_piece(pretoken)


def test_long_white_space() -> None:
    pretoken = b" " * 1_000_000  # the pattern ends tiktoken's process here; its merging takes it
    assert gpt2().encode_bytes(pretoken) == gpt2_tiktoken()._encode_single_piece(pretoken)
    assert gpt2().encode(" " * 100_000 + "x")[-2:] == gpt2().encode("  x")[-2:]


# --- pretokens --------------------------------------------------------------------------------------------------------


def test_character_classes_are_those_of_tiktoken() -> None:
    classes = unicode_table.character_classes()
    for kind, pattern in ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s")):
        assert {chr(code) for code in np.flatnonzero(classes == kind)} == tiktoken_class(pattern)
    assert unicode_table.UNICODE_VERSION == "16.0.0"
    assert chr(0x10D4A) in tiktoken_class(r"\p{L}") and chr(0x10940) not in tiktoken_class(r"\p{L}")  # 16.0, 17.0


def test_every_character_is_cut_as_the_pattern_says() -> None:
    codes = [*range(0x20, 0x3000), *range(0x3000, 0x110000, 7), *np.flatnonzero(unicode_table.character_classes())]
    characters = [chr(code) for code in sorted(set(codes)) if not 0xD800 <= code < 0xE000]
    text = "".join(f"a{character}1 {character} " for character in characters)
    counts = count_pretokens([text]).table
    expected = Counter(pretokens(text.encode()))
    assert dict(zip(counts["pretoken"].to_pylist(), counts["count"].to_pylist(), strict=True)) == expected


nasty_character = st.sampled_from(NASTY).map(str.encode)
bad_bytes = st.lists(
    st.one_of(st.binary(max_size=3), nasty_character, nasty_character.map(lambda data: data[:-1])), max_size=20
).map(b"".join)


@settings(max_examples=1500)
@given(bad_bytes)
@example(b"a\xc0\xafb")  # overlong
@example(b"a\xed\xa0\x80b \xed\xa0\x80")  # surrogate
@example(b"\xf4\x90\x80\x80 \xf5a \xe2\x82")  # beyond Unicode; cut short
@example(b" \xe2\x80\x80\xe2\x80")
def test_bad_bytes_are_neither_letter_nor_number_nor_space(data: bytes) -> None:
    expected = [token for pretoken in pretokens(data) for token in gpt2_tiktoken()._encode_single_piece(pretoken)]
    assert gpt2().encode_bytes(data) == expected
    assert gpt2().decode_bytes(expected) == data


@pytest.mark.parametrize("text", ["", "hello", "hello ", "it's", "naïve", "1984"])
def test_bytes_that_end_badly_have_the_ids_of_tiktoken(text: str) -> None:
    # Not so after two spaces: tiktoken merges its last pretoken anew with all bad bytes, we go by the pattern.
    for tail in (b"", b"\xff", b"\xe2\x82"):
        assert gpt2().encode_bytes(text.encode() + tail) == gpt2_tiktoken()._encode_bytes(text.encode() + tail)


def test_a_cut_character_at_the_end_of_a_document_does_not_read_the_next() -> None:
    data = pa.array([b"x\xe2\x80", b"\x83y", b"\xf0\x9f", b"\x98\x80"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, data.buffers())  # Arrow does not look
    ids, offsets = gpt2().encode_batch(texts)
    assert split(ids, offsets) == [gpt2().encode_bytes(each.as_py()) for each in data]


GUARDED = r"""
import ctypes, mmap
import pyarrow as pa
from pipeline.tokenizer.training import count_pretokens, train_bpe

tokenizer = train_bpe(["the cat's hat  \u2003\u00e9"], 265)
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
assert mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
tails = [b"", b"'", b" ", b" '", b"'r", b"  ", b"\xc3", b"\xe2\x80", b"\xf0", b"\xf0\x9f\x98", b"\xc3\xa9"]
for data in [b"c" * length + tail for length in range(1, 40) for tail in tails]:
    memory[mmap.PAGESIZE - len(data) : mmap.PAGESIZE] = data
    offsets = pa.py_buffer((0).to_bytes(4, "little") + len(data).to_bytes(4, "little"))
    buffer = pa.foreign_buffer(address + mmap.PAGESIZE - len(data), len(data))
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, buffer])
    assert tokenizer.encode_batch(text)[0].tolist() == tokenizer.encode_bytes(data)
    assert sum(count_pretokens(text).table["count"].to_pylist()) > 0
print("fine")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_nothing_behind_the_last_document_is_read() -> None:
    # The text ends where a page begins that must not be touched: a read too far ends the process.
    code = [sys.executable, "-c", GUARDED]
    done = subprocess.run(code, cwd=Path(bpe.__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr


# --- special tokens, decoding, identity ------------------------------------------------------------------------------


def test_text_turns_into_a_special_token_only_where_allowed() -> None:
    text = f"a{END}b {END}"
    assert gpt2().encode(text) == gpt2_tiktoken().encode_ordinary(text)
    assert gpt2().eot_id not in gpt2().encode(text)
    assert gpt2().encode(text, {END}) == gpt2_tiktoken().encode(text, allowed_special={END})
    assert gpt2().encode(text, {END}).count(gpt2().eot_id) == 2
    assert gpt2().decode(gpt2().encode(text, {END})) == text
    with pytest.raises(UserError, match=r"allowed_special names '<\|pad\|>'"):
        gpt2().encode(text, {"<|pad|>"})


def test_the_longest_special_token_wins() -> None:
    tokenizer = Tokenizer([*BYTE_TOKENS, b"<a>", b"<a><b>"], [], {"<a>": 256, "<a><b>": 257})
    assert tokenizer.encode("x<a><b><a>", {"<a>", "<a><b>"}) == [120, 257, 256]
    assert tokenizer.encode("x<a><b><a>", ["<a>"]) == [120, 256, *b"<b>", 256]


def test_decoding_joins_bytes_before_it_reads_characters() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode("é".encode()) == "é"
    assert tokenizer.decode(np.array([195], np.uint16)) == "\ufffd"
    assert tokenizer.decode([257, 258]) == f"abab{END}"
    for bad in ([-1], [259], [0.5]):
        with pytest.raises(UserError, match="below 259"):
            tokenizer.decode_bytes(bad)  # type: ignore[arg-type]


def test_the_largest_vocabulary_is_what_the_kernels_can_pack() -> None:
    assert MAX_TOKENS == merge_short.NO_TOKEN


def test_the_fingerprint_is_of_what_decides_about_ids() -> None:
    tokenizer = tiny_tokenizer()
    content = {
        "merges": [[97, 98], [256, 256]],
        "pattern": GPT2_PATTERN,
        "special_tokens": {END: 258},
        "tokens": [token.hex() for token in [*BYTE_TOKENS, b"ab", b"abab", END.encode()]],
    }
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    other = Tokenizer([*BYTE_TOKENS, b"ab", b"abab", END.encode()], [(97, 98)], {END: 258})
    assert other.fingerprint != tokenizer.fingerprint
    assert PATTERNS["gpt2"] == GPT2_PATTERN


def test_it_travels() -> None:
    gpt2().encode("warm")
    data = pickle.dumps(gpt2())
    assert len(data) < 2_000_000  # neither tables nor compiled code
    copy = pickle.loads(data)
    assert copy.fingerprint == gpt2().fingerprint
    assert copy.encode("Hello, world's end") == gpt2().encode("Hello, world's end")


@pytest.mark.parametrize(
    ("tokens", "merges", "special", "message"),
    [
        (BYTE_TOKENS[1:], [], {}, "no token for the byte 0"),
        ([*BYTE_TOKENS, b"ab"], [(97, 99)], {}, "not in its vocabulary"),
        ([*BYTE_TOKENS, b"ab"], [(97, 98), (97, 98)], {}, "twice"),
        ([*BYTE_TOKENS, b"a"], [], {}, "two ids"),
        ([*BYTE_TOKENS, b"ab", b"ab"], [(97, 98)], {"ab": 257}, "ordinary token too"),
        ([*BYTE_TOKENS, b"x"], [], {"y": 256}, "not at its id"),
    ],
)
def test_a_vocabulary_that_does_not_fit_together(tokens: list, merges: list, special: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokens, merges, special)
