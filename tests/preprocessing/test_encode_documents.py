"""Documents: held out by their hash, encoded part by part."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.preprocessing import encode_documents as documents_module
from pipeline.preprocessing.encode_documents import (
    add_counts,
    encode_documents,
    encode_parts,
    length_counts,
    split_by_hash,
)
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer

FOX, FOX_HASH = "The quick brown fox jumps over the lazy dog", 0xCE7D19A5418FB365  # XXH3_64bits, seed 0


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> Tokenizer:
    return bpe_training.train_bpe(documents, 300)


def large_strings(*chunks: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string()) for texts in chunks])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=8)), fraction=st.floats(0, 1, exclude_max=True), shuffle=st.randoms())
@pytest.mark.parametrize("slice_bytes", [0, 10**9], ids=["slices", "copies"])
def test_split_depends_on_the_text_alone(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int, texts: list[str], fraction: float, shuffle: random.Random
) -> None:
    monkeypatch.setattr(documents_module, "_SLICE_BYTES", slice_bytes)
    copies = texts + texts
    shuffle.shuffle(copies)
    padded = large_strings(["before", *copies[: len(texts)]], [], [*copies[len(texts) :], "behind"])
    train, val = (part.to_pylist() for part in split_by_hash(padded.slice(1, len(copies)), fraction))
    alone = [split_by_hash(large_strings([text]), fraction)[1].to_pylist() for text in copies]
    assert val == [text for text, found in zip(copies, alone, strict=True) if found]
    assert train == [text for text, found in zip(copies, alone, strict=True) if not found]
    assert not set(train) & set(val)


def test_split_has_the_asked_share() -> None:
    texts = large_strings([f"document {i}" for i in range(20_000)])
    _, val = split_by_hash(texts, 0.1)
    assert abs(len(val) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5  # five standard deviations of a fair choice
    assert set(split_by_hash(texts, 0.05)[1].to_pylist()) < set(val.to_pylist())


def test_split_stays_the_same_whatever_the_version_of_the_hash_library() -> None:
    """The val documents of a data set must not be train documents of the next."""
    for fraction, num_val in ((FOX_HASH / 2**64 - 1e-9, 0), (FOX_HASH / 2**64 + 1e-9, 1)):
        _, val = split_by_hash(large_strings([FOX]), fraction)
        assert len(val) == num_val


def test_split_copies_no_train_document_where_few_are_val() -> None:
    texts = large_strings([f"{i:06d}" * 700 for i in range(2_000)])
    train, val = split_by_hash(texts, 0.005)
    held_out = {text for text in texts.to_pylist() if xxhash.xxh3_64_intdigest(text.encode()) < 0.005 * 2**64}
    assert val.to_pylist() == [text for text in texts.to_pylist() if text in held_out] and len(val) > 0
    assert train.to_pylist() == [text for text in texts.to_pylist() if text not in held_out]
    assert {chunk.buffers()[2].address for chunk in train.chunks} == {texts.chunk(0).buffers()[2].address}


def test_documents_begin_with_end_of_text(tokenizer: Tokenizer, documents: list[str]) -> None:
    expected = [id_ for text in ["", *documents, ""] for id_ in (tokenizer.eot_id, *tokenizer.encode(text))]
    assert encode_documents(tokenizer, large_strings(["", *documents], [""])).tolist() == expected
    assert len(encode_documents(tokenizer, large_strings([]))) == 0


@pytest.mark.parametrize("array_type", [pa.string(), pa.large_string()])
def test_parts_are_the_item_cut_between_arrays(
    tokenizer: Tokenizer, documents: list[str], array_type: pa.DataType
) -> None:
    arrays = [pa.array(documents[start : start + 40], array_type) for start in range(0, len(documents), 40)]
    (whole,) = encode_parts(arrays, tokenizer, val_fraction=0.2, part_bytes=10**9)
    size = sum(len(text.encode()) for text in documents)
    parts = list(encode_parts(arrays, tokenizer, val_fraction=0.2, part_bytes=size // 4))
    assert 3 <= len(parts) <= 5
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True] and whole.is_last
    sides = split_by_hash(large_strings(documents), 0.2)
    for split, texts in zip(("train", "val"), sides, strict=True):
        expected = encode_documents(tokenizer, texts)
        assert whole.ids[split].tolist() == expected.tolist()
        assert np.concatenate([part.ids[split] for part in parts]).tolist() == expected.tolist()
        assert whole.documents[split] == sum(part.documents[split] for part in parts) == len(texts)
        num_bytes = sum(len(text.encode()) for text in texts.to_pylist())
        assert whole.text_bytes[split] == sum(part.text_bytes[split] for part in parts) == num_bytes
    assert add_counts(part.lengths for part in parts) == whole.lengths


def test_an_empty_item_is_one_empty_part(tokenizer: Tokenizer) -> None:
    (part,) = encode_parts([], tokenizer, val_fraction=0.2, part_bytes=1)
    assert part.is_last and part.documents == {"train": 0, "val": 0}
    assert part.ids["train"].dtype == np.uint16 and len(part.ids["train"]) == len(part.ids["val"]) == 0


def test_lengths_are_counted_by_powers_of_two() -> None:
    texts = large_strings(["a", "bc", "def", "żółw", "x" * 8, "y" * 1023, "z" * 1024])  # żółw: 7 bytes
    assert length_counts(texts) == [1, 2, 1, 1, 0, 0, 0, 0, 0, 1, 1]
