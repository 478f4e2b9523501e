"""Documents by the batch: what texts may be, where ids begin, caches that fill up, threads, widths of ids."""

from __future__ import annotations

import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tokenizer.bpe import CACHE_LOAD, FIRST_SLOTS, Tokenizer, pretokenize
from pipeline.tokenizer.kernels.merge_short import SHORT_MERGE_BYTES
from tests.support.bpe_references import NASTY, documents, gpt2, gpt2_tiktoken, naive_ids

nasty_text = st.lists(st.sampled_from(NASTY), max_size=40).map("".join)
high_bytes = st.lists(st.integers(0x80, 0xFF), min_size=1, max_size=40).map(bytes)
BYTE_TOKENS = [bytes([byte]) for byte in range(256)]
END = "<|endoftext|>"


def tiny_tokenizer() -> Tokenizer:
    """The bytes, "ab", "abab" and the end of text."""
    return Tokenizer([*BYTE_TOKENS, b"ab", b"abab", END.encode()], [(97, 98), (256, 256)], {END: 258})


def split(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


# --- what texts may be -----------------------------------------------------------------------------------------------

TEXTS = ["it's", "", "  two\n", "漢字", "x" * 300, "", "end "]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_arrow_layouts(kind: Any) -> None:
    array = pa.array(TEXTS, kind)
    expected = [gpt2_tiktoken().encode_ordinary(text) for text in TEXTS]
    assert split(*gpt2().encode_batch(array)) == expected
    assert split(*gpt2().encode_batch(array.slice(2, 4))) == expected[2:6]
    chunked = pa.chunked_array([array.slice(1, 3), array.slice(0, 0), array.slice(3)])
    assert split(*gpt2().encode_batch(chunked)) == expected[1:4] + expected[3:]
    assert split(*gpt2().encode_batch(pa.chunked_array([], kind))) == []
    assert split(*gpt2().encode_batch(pa.array(["", ""], kind))) == [[], []]


def test_a_null_in_arrow_is_an_empty_text() -> None:
    # The null has bytes of its own, which Arrow allows and which mean nothing.
    data, offsets = pa.py_buffer(b"onetwothree"), pa.py_buffer(np.array([0, 3, 6, 11], np.int32).data)
    array = pa.Array.from_buffers(pa.string(), 3, [pa.py_buffer(bytes([0b101])), offsets, data])
    assert array.to_pylist() == ["one", None, "three"]
    expected = [gpt2().encode("one"), [], gpt2().encode("three")]
    assert split(*gpt2().encode_arrow(array)) == expected
    assert split(*gpt2().encode_arrow(pa.chunked_array([array.slice(1), array]))) == [*expected[1:], *expected]
    assert split(*gpt2().encode_arrow(pa.array([None, None], pa.string()))) == [[], []]
    assert split(*gpt2().encode_arrow(array, prefix=7)) == [[7, *ids] for ids in expected]


@settings(max_examples=60)
@given(st.lists(nasty_text, max_size=12), st.integers(1, 5))
def test_a_prefix_and_threads(texts: list[str], num_threads: int) -> None:
    array = pa.array(texts, pa.string())
    expected = [gpt2().encode(text) for text in texts]
    assert split(*gpt2().encode_arrow(array, num_threads=num_threads)) == expected
    assert split(*gpt2().encode_batch(texts, num_threads=num_threads)) == expected
    end = gpt2().eot_id
    assert split(*gpt2().encode_arrow(array, prefix=end, num_threads=num_threads)) == [[end, *ids] for ids in expected]


def test_a_prefix_must_be_an_id() -> None:
    for prefix in (-1, 259):
        with pytest.raises(UserError, match=f"prefix is {prefix}; it must be an id from 0 to 258"):
            tiny_tokenizer().encode_arrow(pa.array(["a"]), prefix=prefix)
    with pytest.raises(UserError, match="num_threads is 0"):
        tiny_tokenizer().encode_batch(["a"], num_threads=0)


def test_lists_are_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*documents(50), "", "\ud800 alone", "é" * 40, *["x"] * 500]
    expected = [gpt2_tiktoken().encode_ordinary(text) for text in texts]
    for chars in (1, 1000, 50_000):
        monkeypatch.setattr("pipeline.tokenizer.text_buffers.SLICE_CHARS", chars)
        assert split(*gpt2().encode_batch(texts)) == expected
    assert split(*gpt2().encode_batch(tuple(texts))) == expected


def test_batches_are_decoded() -> None:
    texts = [*documents(20), "", "漢字 \U0001f600"]
    assert gpt2().decode_batch(*gpt2().encode_batch(texts)) == texts
    assert gpt2().decode_batch(*gpt2().encode_batch([])) == []


def test_nothing_at_all() -> None:
    ids, offsets = gpt2().encode_batch([])
    assert ids.size == 0 and offsets.tolist() == [0]
    assert gpt2().encode("") == [] and gpt2().decode([]) == "" and gpt2().encode_bytes(b"") == []


def test_lone_surrogates_become_replacement_characters_as_in_tiktoken() -> None:
    texts = ["a\ud800b", "\ud83d\ude00", "fine"]
    expected = [gpt2_tiktoken().encode_ordinary(text) for text in texts]
    assert [gpt2().encode(text) for text in texts] == expected
    assert split(*gpt2().encode_batch(texts)) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (pa.array(["a", None]), "1 of 2 texts are null, the first in row 1"),
        (pa.chunked_array([["a"], [None, "b"]]), "1 of 3 texts are null, the first in row 1"),
        (["a", None, None], "2 of 3 texts are null"),
        (pa.array([1, 2]), "Arrow array of int64"),
        (pa.array(["a"]).dictionary_encode(), "dictionary"),
        ([1, "a"], "not all str, but int too"),
        ("abc", "one str"),
    ],
)
def test_what_is_not_text_is_refused(texts: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_tokenizer().encode_batch(texts)


@pytest.mark.parametrize("offsets", [[0, 9, 3], [0, 2, 1, 3], [0, -1, 3]])
def test_corrupt_offsets_are_refused(offsets: list[int]) -> None:
    # Arrow itself looks at the first and the last only.
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32).data), pa.py_buffer(b"abc")]
    with pytest.raises(UserError, match="corrupt"):
        tiny_tokenizer().encode_batch(pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers))


# --- table, threads, sizes -------------------------------------------------------------------------------------------


def test_a_full_cache_is_emptied_and_nothing_changes() -> None:
    texts = [*documents(40), "".join(NASTY) * 3, "x" * 200]
    expected = split(*gpt2().encode_batch(texts))
    tokens, merges, special_tokens, _ = gpt2()._vocabulary
    for slots in (4096, 8192):
        small = Tokenizer(tokens, merges, special_tokens, cache_slots=slots)
        assert split(*small.encode_batch(texts)) == expected
        copy: Tokenizer = pickle.loads(pickle.dumps(small))
        assert split(*copy.encode_batch(texts[:5])) == expected[:5]
    for slots in (0, 2048, 5000, -4096):
        with pytest.raises(ValueError, match="power of two"):
            Tokenizer(tokens, merges, special_tokens, cache_slots=slots)


@pytest.mark.parametrize("cache_slots", [FIRST_SLOTS // 4, FIRST_SLOTS, 1 << 20])
def test_more_pretokens_than_a_cache_holds(cache_slots: int) -> None:
    # Short ones, long ones (above 15 bytes their bytes are kept apart), ones of many ids (kept apart too): all twice.
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.choice((4, 9, 15, 16, 40, 200)))) for _ in range(60_000)]
    assert len(set(words)) > FIRST_SLOTS * CACHE_LOAD
    texts = [" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000)] * 2
    tokens, merges, special_tokens, pattern = gpt2()._vocabulary
    tokenizer = Tokenizer(tokens, merges, special_tokens, pattern=pattern, cache_slots=cache_slots)
    expected = gpt2_tiktoken().encode_ordinary_batch(texts[:60], num_threads=1)
    assert split(*tokenizer.encode_batch(texts)) == expected * 2


@settings(max_examples=100)
@given(st.text(alphabet="ab", min_size=1, max_size=300), st.data())
def test_merging_is_as_it_is_defined(word: str, data: st.DataObject) -> None:
    # Few letters and few merges in any order: ties, chains, pretokens around the length where the tree begins.
    lengths = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 66, 255, 256, 257, 300])
    pretokens = [(word * 300)[: data.draw(lengths)] for _ in range(3)]
    tokens = [*BYTE_TOKENS, b"ab", b"ba", b"aa", b"abab", b"aab", b"baa", b"aaaa"]
    pairs = [(97, 98), (98, 97), (97, 97), (256, 256), (97, 256), (257, 97), (258, 258)]
    tokenizer = Tokenizer(tokens, data.draw(st.permutations(pairs)), {})
    for pretoken in pretokens:
        assert tokenizer.encode(pretoken) == naive_ids(tokenizer, pretoken.encode())


def test_every_letter_of_three_bytes_among_others() -> None:
    letters = [chr(code) for code in range(0x800, 0x10000) if chr(code).isalpha()]
    random.Random(0).shuffle(letters)
    texts = ["".join(letters[start : start + 25]) for start in range(0, len(letters), 25)]
    assert split(*gpt2().encode_batch(texts)) == gpt2_tiktoken().encode_ordinary_batch(texts, num_threads=1)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from("漢字的一ー한").map(str.encode), high_bytes), min_size=6).map(b"".join))
def test_long_pretokens_of_characters_and_halves_of_them(data: bytes) -> None:
    expected = [token for pretoken in pretokenize(data) for token in naive_ids(gpt2(), pretoken)]
    assert gpt2().encode_bytes(data) == expected


def test_ids_need_not_be_in_the_order_of_the_merges() -> None:
    tokens, merges, special_tokens, _ = gpt2()._vocabulary
    new_ids = np.random.default_rng(0).permutation(len(tokens))
    moved = [b""] * len(tokens)
    for new_id, token in zip(new_ids.tolist(), tokens, strict=True):
        moved[new_id] = token
    pairs = [(int(new_ids[left]), int(new_ids[right])) for left, right in merges]
    tokenizer = Tokenizer(moved, pairs, {name: int(new_ids[old]) for name, old in special_tokens.items()})
    for text in [
        "Mississippi foxes internationalization",
        "漢字かな混じり文を分かち書きせずに長く書く。",
        "x" * 100,
        "的一" * 40,
        "é漢",
    ]:
        assert tokenizer.encode(text) == new_ids[gpt2().encode(text)].tolist()


def test_a_tree_of_three_levels() -> None:
    pretoken = ("the quick brown fox".replace(" ", "") * 400)[: 16 * 16 * SHORT_MERGE_BYTES // 8 + 5]
    assert gpt2().encode(pretoken) == naive_ids(gpt2(), pretoken.encode())


def test_threads_share_a_tokenizer() -> None:
    texts = documents(200)
    expected = gpt2().encode_batch(texts)
    with ThreadPoolExecutor(4) as pool:
        for ids, offsets in pool.map(gpt2().encode_batch, [texts] * 8):
            np.testing.assert_array_equal(ids, expected[0])
            np.testing.assert_array_equal(offsets, expected[1])


def test_above_65536_ids_are_uint32() -> None:
    # 20,000 special tokens come first, so that every id is GPT-2's and 20,000.
    names = [f"<|{index}|>" for index in range(20_000)]
    ordinary = [gpt2().decode_bytes([index]) for index in range(50_256)]
    merges = [(left + 20_000, right + 20_000) for left, right in gpt2()._vocabulary.merges]
    wide = Tokenizer([*map(str.encode, names), *ordinary], merges, {name: index for index, name in enumerate(names)})
    texts = [*documents(60), "".join(NASTY) * 2, "qzx " * 40]
    ids, offsets = wide.encode_batch(texts)
    assert wide.vocab_size == 70_256 and ids.dtype == np.uint32 and ids.max() > 65_536
    assert split(ids - np.uint32(20_000), offsets) == [gpt2().encode(text) for text in texts]


def test_exactly_65536_ids_are_uint16() -> None:
    names = [f"<|{index}|>" for index in range(65_537 - 256)]
    tokens = [*BYTE_TOKENS, *map(str.encode, names)]
    special = {name: 256 + index for index, name in enumerate(names)}
    assert Tokenizer(tokens, [], special).id_dtype == np.uint32
    del special[names[-1]]
    assert Tokenizer(tokens[:-1], [], special).encode_batch(["ab"])[0].dtype == np.uint16
