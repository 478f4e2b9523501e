"""Counting and learning against a naive trainer, and the same result for any way of dividing the work."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.files import to_byte_characters
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import PretokenCounts, count_pretokens, merge_counts, train_bpe
from tests.support.bpe_references import BOTH, NASTY, as_tiktoken, documents, naive_merges, pretokens

nasty_text = st.lists(st.sampled_from(NASTY), max_size=40).map("".join)


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    tokens = tokenizer._vocabulary.tokens
    return [(tokens[left], tokens[right]) for left, right in tokenizer._vocabulary.merges]


def as_dict(counts: PretokenCounts) -> dict[bytes, int]:
    rows: Any = zip(counts.table["pretoken"].to_pylist(), counts.table["count"].to_pylist(), strict=True)
    return dict(rows)


def learn(texts: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    return merges(train_bpe(texts, 257 + num_merges))


# --- learning --------------------------------------------------------------------------------------------------------


def test_real_text_is_learned_as_the_naive_trainer_does() -> None:
    texts = documents(10)
    assert learn(texts, 250) == naive_merges(texts, 250)


@settings(max_examples=150)
@given(st.lists(st.text(alphabet="abc ", max_size=30), max_size=8), st.integers(0, 60))
def test_few_letters_many_ties(texts: list[str], num_merges: int) -> None:
    expected = naive_merges(texts, num_merges)
    assert learn(texts, len(expected)) == expected


@settings(max_examples=100)
@given(st.lists(nasty_text, max_size=8), st.integers(0, 60))
def test_nasty_text(texts: list[str], num_merges: int) -> None:
    expected = naive_merges(texts, num_merges)
    assert learn(texts, len(expected)) == expected


@settings(max_examples=60)
@given(st.lists(nasty_text, max_size=8), st.integers(0, 60))
def test_nasty_text_cut_by_the_other_pattern(texts: list[str], num_merges: int) -> None:
    expected = naive_merges(texts, num_merges, "cl100k")
    assert merges(train_bpe(texts, 257 + len(expected), pattern="cl100k")) == expected


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 15, 16, 31, 100])
def test_runs_of_one_letter(length: int) -> None:
    texts = ["a" * length, "ba" + "a" * length]
    expected = naive_merges(texts, 50)
    assert learn(texts, len(expected)) == expected


def test_ties_go_to_the_greatest_pair_of_byte_strings() -> None:
    assert learn(["az", "by", "ca"], 1) == [(b"c", b"a")]  # left side first
    assert learn(["ab", "ac", "az"], 1) == [(b"a", b"z")]  # then the right
    assert learn(["é", "z1", "ab"], 1) == [(b"\xc3", b"\xa9")]  # bytes, not characters; "z1" is two pretokens
    long = ["abcdefghij" * 2, "abcdefghik" * 2]  # the first eight bytes do not tell
    expected = naive_merges(long, 30)
    assert learn(long, len(expected)) == expected


def test_ids_are_bytes_then_merges_then_special_tokens() -> None:
    tokenizer = train_bpe(["abab"], 260, special_tokens=["<|endoftext|>", "<|pad|>"])
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [tokenizer.decode_bytes([i]) for i in (256, 257)] == [b"ab", b"abab"]
    assert tokenizer.special_tokens == {"<|endoftext|>": 258, "<|pad|>": 259} and tokenizer.eot_id == 258
    assert train_bpe(["abab"], 259).eot_id == 258 and train_bpe([], 257).eot_id == 256


def test_special_tokens_in_the_text_are_text() -> None:
    text = "<|endoftext|> " * 5
    expected = naive_merges([text], 14)
    tokenizer = train_bpe([text], 257 + len(expected))
    assert merges(tokenizer) == expected
    assert tokenizer.eot_id not in tokenizer.encode(text)


def test_a_trained_tokenizer_encodes_as_tiktoken_does() -> None:
    texts = documents(120)
    tokenizer = train_bpe(texts[:60], 4000)
    theirs = as_tiktoken(tokenizer)
    for text in [*texts[60:], "".join(NASTY)]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


@settings(max_examples=150)
@given(st.lists(st.text(alphabet="abc ", max_size=30), max_size=8), st.integers(1, 6))
def test_rare_pairs_are_not_merged(texts: list[str], min_frequency: int) -> None:
    expected = naive_merges(texts, 200, min_frequency=min_frequency)
    enough = 257 + len(expected)
    assert merges(train_bpe(texts, enough, min_frequency=min_frequency)) == expected
    if min_frequency > 1:
        assert merges(train_bpe(texts, enough + 50, min_frequency=min_frequency)) == expected


@pytest.mark.parametrize("min_frequency", [1, 2, 3, 4, 9, 10])
def test_min_frequency_means_what_it_does_in_tokenizers(min_frequency: int) -> None:
    text = " ".join(["ab"] * 3 + ["abc"] * 4 + ["de"] * 2 + ["f-g"])  # counts 7, 4, 2 and 1 at the start, no ties
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=min_frequency,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)
    expected = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    ours = train_bpe([text], 257 + len(expected), min_frequency=min_frequency)
    shown = [tuple(to_byte_characters([*pair])) for pair in merges(ours)]
    assert shown == expected
    with pytest.raises(UserError) if min_frequency == 1 else contextlib.nullcontext():
        assert train_bpe([text], 1000, min_frequency=min_frequency).vocab_size == 257 + len(expected)


def test_a_vocabulary_that_stays_small_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train_bpe(["abab abab cd"], 300, ["<|endoftext|>", "<|pad|>"], min_frequency=2)
    assert merges(tokenizer) == [(b"a", b"b"), (b"ab", b"ab")]
    assert tokenizer.special_tokens == {"<|endoftext|>": 258, "<|pad|>": 259}
    (record,) = caplog.records
    assert record.getMessage() == (
        "the vocabulary has 260 ids, not 300: after 2 merges no pair of tokens occurs 2 times (min_frequency)"
    )


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    train_bpe(documents(5), 257 + 250, progress=lambda done, wanted: seen.append((done, wanted)))
    assert seen[-1] == (250, 250) and len(seen) <= 101
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_arrays_that_grow_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*documents(12), "x" * 5000, "漢" * 900]
    counts, expected = as_dict(count_pretokens(texts)), learn(texts, 600)
    monkeypatch.setattr(bpe_training, "FIRST_SLOTS", 4)
    monkeypatch.setattr(bpe_training, "FIRST_KEPT_BYTES", 16)
    byte_pairs = {
        pretoken[i : i + 2] for text in texts for pretoken in pretokens(text.encode()) for i in range(len(pretoken) - 1)
    }
    monkeypatch.setattr(bpe_training, "FIRST_PAIRS", len(byte_pairs))
    assert as_dict(count_pretokens(texts)) == counts
    assert learn(texts, 600) == expected


@pytest.mark.parametrize(
    ("texts", "vocab_size", "special", "message"),
    [
        (["abab"], 256, ["<|endoftext|>"], "vocab_size is 256, but the 256 bytes and 1 special tokens need 257"),
        (["abab"], 300, ["<|endoftext|>"], "supports a vocabulary of 259 only, not 300: after 2 merges"),
        ([], 300, ["<|endoftext|>"], "supports a vocabulary of 257 only"),
        (["abab"], 258, ["ab"], "the special token 'ab'"),
        (["abab"], 259, ["x", "x"], "two special tokens the same id|special"),
        (["abab", None], 258, ["x"], "null"),
    ],
)
def test_what_cannot_be_trained_is_said(texts: list[str], vocab_size: int, special: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_bpe(texts, vocab_size, special)


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=200)
@given(st.lists(nasty_text, max_size=10))
def test_counts_are_those_of_the_pattern(pattern: Pattern, texts: list[str]) -> None:
    counts = count_pretokens(texts, pattern=pattern)
    assert as_dict(counts) == Counter(pretoken for text in texts for pretoken in pretokens(text.encode(), pattern))
    assert list(as_dict(counts)) == sorted(as_dict(counts))


def test_counts_of_real_text() -> None:
    texts = documents(100)
    assert as_dict(count_pretokens(texts)) == Counter(
        pretoken for text in texts for pretoken in pretokens(text.encode())
    )


@settings(max_examples=60)
@given(st.lists(nasty_text, max_size=12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_division_of_the_work_gives_the_same_counts(texts: list[str], workers: int, shuffle: random.Random) -> None:
    parts = [count_pretokens(texts[worker::workers]) for worker in range(workers)]
    shuffle.shuffle(parts)
    whole = count_pretokens(texts)
    assert merge_counts(parts).table.equals(whole.table)
    assert merge_counts([merge_counts(parts[:2]), *parts[2:]]).table.equals(whole.table)


@settings(max_examples=60)
@given(st.lists(nasty_text, max_size=12), st.integers(2, 5), st.integers(0, 5))
def test_any_number_of_threads_gives_the_same_counts(texts: list[str], num_threads: int, cut: int) -> None:
    chunks = [
        pa.array(["before", *texts[:cut]]).slice(1),
        pa.array([]).cast(pa.string()),
        pa.array(texts[cut:], "string"),
    ]
    whole = count_pretokens(texts)
    assert count_pretokens(pa.chunked_array(chunks), num_threads=num_threads).table.equals(whole.table)


def test_threads_on_real_text() -> None:
    texts = documents(200)
    assert count_pretokens(texts, num_threads=3).table.equals(count_pretokens(texts).table)


def test_training_from_parts_is_training_from_the_whole() -> None:
    texts = documents(60)
    whole = train_bpe(pa.array(texts, pa.large_string()), 1000)
    parts = merge_counts(count_pretokens(pa.array(texts[start : start + 7])) for start in range(0, 60, 7))
    assert train_bpe(parts, 1000).fingerprint == whole.fingerprint
    sliced = PretokenCounts(table=pa.concat_tables([parts.table.slice(100), parts.table.slice(0, 100)]))
    assert train_bpe(sliced, 1000).fingerprint == whole.fingerprint


def test_nothing_to_count() -> None:
    assert count_pretokens([]).table.num_rows == 0 and count_pretokens(["", ""]).table.num_rows == 0
    assert merge_counts([]).table.equals(count_pretokens([]).table)


def test_counts_know_their_pattern() -> None:
    counts = count_pretokens(["abab"], pattern="cl100k")
    assert counts.pattern == "cl100k" and merge_counts([counts, counts]).pattern == "cl100k"
    assert train_bpe(counts, 258).pattern == train_bpe(["abab"], 258, pattern="cl100k").pattern == "cl100k"
    assert train_bpe(["abab"], 258).pattern == count_pretokens([]).pattern == "gpt2"
    with pytest.raises(UserError, match="counts of the patterns cl100k and gpt2 cannot be added up"):
        merge_counts([counts, count_pretokens(["abab"])])
    with pytest.raises(UserError, match="pattern is gpt2, but the counts are of the pattern cl100k"):
        train_bpe(counts, 258, pattern="gpt2")


unknown: Any = "gpt3"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_pretokens(["a"], pattern=unknown), "pattern is 'gpt3'; it must be one of gpt2, cl100k"),
        (lambda: train_bpe(["a"], 257, pattern=unknown), "pattern is 'gpt3'"),
        (lambda: count_pretokens(["a"], num_threads=0), "num_threads is 0; it must be positive"),
        (lambda: train_bpe(["a"], 257, min_frequency=0), "min_frequency is 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_counts_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match="schema"):
        PretokenCounts(table=pa.table({"pretoken": ["a"], "count": [1]}))
