"""The tokenizer against tiktoken and `tokenizers`: 100,000 texts, the corpus, every character, 1 GB in one pretoken.

Of the 100,000, 60,000 are made of traps, 30,000 of any characters, 10,000 of bytes that are not all UTF-8; half of each
by either pattern. They come ten at a time, because the libraries are called in batches.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.tokenizer import bpe
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import count_pretokens
from tests.conftest import shared_folder
from tests.support.bpe_references import (
    BAD_BYTES,
    BOTH,
    EXPRESSIONS,
    NASTY,
    documents,
    gpt2,
    gpt2_tiktoken,
    gpt2_tokenizers,
    pretokens,
    tokenizers_pretokens,
)

pytestmark = pytest.mark.slow

TEXTS_PER_EXAMPLE = 10
GIGABYTE = 1_000_000_000
many = [HealthCheck.too_slow, HealthCheck.data_too_large]


def ten(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(texts, min_size=TEXTS_PER_EXAMPLE, max_size=TEXTS_PER_EXAMPLE)


def split(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets.tolist())]


def assert_ids_of_both_libraries(texts: list[str], pattern: Pattern) -> None:
    ours = split(*gpt2(pattern).encode_batch(texts))
    assert ours == gpt2_tiktoken(pattern).encode_ordinary_batch(texts, num_threads=1)
    assert ours == [encoding.ids for encoding in gpt2_tokenizers(pattern).encode_batch(texts)]


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=3000, suppress_health_check=many)
@given(texts=ten(st.lists(st.sampled_from(NASTY), max_size=16).map("".join)))
def test_60_000_nasty_texts(pattern: Pattern, texts: list[str]) -> None:
    assert_ids_of_both_libraries(texts, pattern)


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=1500, suppress_health_check=many)
@given(texts=ten(st.text(max_size=24)))
def test_30_000_texts_of_any_characters(pattern: Pattern, texts: list[str]) -> None:
    assert_ids_of_both_libraries(texts, pattern)


some_bytes = st.one_of(st.binary(max_size=3), st.sampled_from(BAD_BYTES), *[st.sampled_from(NASTY).map(str.encode)] * 2)


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=500, suppress_health_check=many)
@given(batch=st.lists(st.lists(some_bytes, max_size=8).map(b"".join), min_size=10, max_size=10))
def test_10_000_texts_of_bytes(pattern: Pattern, batch: list[bytes]) -> None:
    # What tiktoken does with bytes: from the last pretoken before the first bad byte on it no longer splits, but merges
    # all the rest as one pretoken. So its ids are ours if, and only if, none of its tokens crosses a place where the
    # pattern splits, a bad byte being one character of no class.
    for data in batch:
        parts, tokenizer = pretokens(data, pattern), gpt2(pattern)
        ours, theirs = tokenizer.encode_bytes(data), gpt2_tiktoken(pattern)._encode_bytes(data)
        assert ours == [each for part in parts for each in gpt2_tiktoken(pattern)._encode_single_piece(part)]
        token_ends = set(itertools.accumulate(len(tokenizer.decode_bytes([each])) for each in theirs))
        is_cut_alike = token_ends.issuperset(itertools.accumulate(map(len, parts)))
        assert (ours == theirs) == is_cut_alike


@pytest.mark.parametrize(
    ("data", "pattern", "is_same"),
    [
        *[(b"a\xff", "gpt2", True), (b"a \xe2\x80", "gpt2", True), (b"it's\xff, they're", "gpt2", True)],
        (b"\xff's", "gpt2", False),  # \xff' and s to the pattern
        ("\u043e\u043e".encode()[:3], "gpt2", False),  # GPT-2 has a token of a letter and half of the next
        *[(b"\xff1984x", "gpt2", True), (b"\xff1984x", "cl100k", False)],  # GPT-2 has a token 1984
    ],
)
def test_bytes_where_tiktoken_cuts_alike_and_where_not(data: bytes, pattern: Pattern, is_same: bool) -> None:
    assert (gpt2(pattern).encode_bytes(data) == gpt2_tiktoken(pattern)._encode_bytes(data)) == is_same


@pytest.mark.parametrize(
    ("part", "pattern"), [*[(part, "gpt2") for part in range(6)], *[(part, "cl100k") for part in range(2)]]
)
def test_every_document_of_the_corpus(part: int, pattern: Pattern) -> None:
    table = pq.read_table(shared_folder("corpus") / f"part-{part:03}.parquet", columns=["text"])
    ids, offsets = gpt2(pattern).encode_arrow(table["text"])
    for start in range(0, table.num_rows, 1000):
        texts = table["text"].slice(start, 1000).to_pylist()
        expected = gpt2_tiktoken(pattern).encode_ordinary_batch(texts, num_threads=1)
        assert split(ids, offsets[start : start + len(texts) + 1]) == expected


@pytest.mark.parametrize("pattern", BOTH)
def test_every_character_in_every_place(pattern: Pattern) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 100_000):
        text = "".join(f"a{each}x '{each}x 1{each}1 {each} " for each in characters[start : start + 100_000])
        (theirs,) = tokenizers_pretokens([text], EXPRESSIONS[pattern])
        assert pretokens(text.encode(), pattern) == theirs
        assert bpe.pretokenize(text.encode(), pattern) == theirs


def one_document(data: bytes) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64).data)
    return pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(data)])


@pytest.mark.parametrize("pattern", BOTH)
def test_a_document_of_one_gigabyte(pattern: Pattern) -> None:
    # It begins and ends so that the pattern cuts between one copy and the next; needs about 3 GB of memory.
    unit = "Begin " + "\n".join(documents(2000)).strip() + ".\n"
    unit_ids = np.array(gpt2_tiktoken(pattern).encode_ordinary(unit), np.uint16)
    copies = -(-GIGABYTE // len(unit.encode()))
    document = one_document(unit.encode() * copies)
    ids, offsets = gpt2(pattern).encode_arrow(document)
    assert offsets.tolist() == [0, copies * unit_ids.size]
    assert (ids.reshape(copies, unit_ids.size) == unit_ids).all()
    del ids
    once = count_pretokens([unit], pattern=pattern).table
    counted = count_pretokens(document, pattern=pattern).table
    assert counted["pretoken"].equals(once["pretoken"])
    assert (counted["count"].to_numpy() == copies * once["count"].to_numpy()).all()


def test_white_space_of_one_gigabyte() -> None:
    # One pretoken but for its last blank, which belongs to the word.
    data = b" " * GIGABYTE + b"x"
    assert [len(pretoken) for pretoken in bpe.pretokenize(data)] == [GIGABYTE - 1, 2]


def test_one_letter_a_hundred_million_times() -> None:
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)] + [b"aa", b"aaaa"], [(97, 97), (256, 256)], {})
    ids, _ = tokenizer.encode_arrow(one_document(b"a" * 100_000_003))
    assert (ids[:-2] == 257).all() and ids[-2:].tolist() == [256, 97]
