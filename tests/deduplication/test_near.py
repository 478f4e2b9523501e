"""Near-duplicates: words, signatures, pairs and components against plain Python; recall against exact Jaccard."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deduplication import exact, minhash, near
from pipeline.deduplication.minhash import Scheme, sign
from pipeline.deduplication.shingles import shingle_hashes, word_hashes
from tests.support.near_copies import planted, words_of

Sets = list[frozenset[tuple[str, ...]]]


def shingle_set(text: str, length: int = 5) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    if not words:
        return frozenset()
    return frozenset(tuple(words[start : start + length]) for start in range(max(1, len(words) - length + 1)))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def hash_lists(texts: Sequence[str]) -> list[list[int]]:
    hashes, ends = word_hashes(pa.array(texts, pa.large_string()))
    return [part.tolist() for part in np.split(hashes, ends[:-1])]


# ---- words and shingles ----------------------------------------------------------------------------------------------

ALPHABETS = [
    st.characters(codec="utf-8", exclude_categories=("Cn", "Co")),
    st.sampled_from("aAbé1٣ .,-'\n\t日本ไทÅßΣσςИйéñİı½²"),
]


@given(st.lists(st.text(st.one_of(*ALPHABETS), max_size=30), min_size=1, max_size=6))
def test_words_are_those_of_plain_python(texts: list[str]) -> None:
    """Equal words have equal hashes and no others: the lists are the same up to one renaming."""
    expected = [words_of(text) for text in texts]
    found = hash_lists(texts)
    assert [len(words) for words in found] == [len(words) for words in expected]
    pairs = {pair for words, hashes in zip(expected, found, strict=True) for pair in zip(words, hashes, strict=True)}
    assert len({word for word, _ in pairs}) == len({hashed for _, hashed in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The CAFÉ, in 1984!", "the cafe in 2024"),
        ("naïve\u00a0test", "nai\u0308ve   TEST."),
        ("don't", "don t"),
        ("日本語", "日 本 語"),
        ("ΣΊΣΥΦΟΣ", "σισυφοσ"),
        ("x٣", "x7"),
    ],
)
def test_what_makes_no_difference(one: str, other: str) -> None:
    assert hash_lists([one]) == hash_lists([other])
    assert words_of(one) == words_of(other)


@given(st.lists(st.text("ab ", max_size=24), min_size=1, max_size=5), st.integers(1, 6), st.booleans())
def test_shingles_are_runs_of_words(texts: list[str], length: int, only_whole: bool) -> None:
    found = shingle_hashes(word_hashes(pa.array(texts, pa.large_string())), length, only_whole=only_whole)
    lists = [part.tolist() for part in np.split(found.hashes, found.ends[:-1])]
    names: dict[tuple[str, ...], int] = {}
    for text, hashes in zip(texts, lists, strict=True):
        words = words_of(text)
        runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
        if not runs and words and not only_whole:
            runs = [tuple(words)]
        assert len(runs) == len(hashes)
        for run, hashed in zip(runs, hashes, strict=True):
            assert names.setdefault(run, hashed) == hashed
    assert len(set(names.values())) == len(names)


def test_sliced_and_empty_arrays() -> None:
    texts = pa.array(["x y", "one two three", "", "four"], pa.large_string())
    keys, shingles, ends = sign(texts.slice(1, 3), Scheme(words=2))
    whole = sign(texts, Scheme(words=2))
    assert (keys == whole[0][1:]).all() and ends.tolist() == [2, 2, 3] and shingles.tolist() == whole[1][1:].tolist()
    assert (keys[1] == 0).all() and (keys[0] != 0).all()
    assert sign(texts.slice(0, 0), Scheme())[0].shape == (0, 14)


# ---- signatures ------------------------------------------------------------------------------------------------------


def reference_keys(text: str, scheme: Scheme, hashed: dict[tuple[str, ...], int]) -> list[tuple[int, ...]]:
    """The least hashes of every band, in Python's numbers. hashed: the 32-bit hash of every shingle."""
    factors, shifts = minhash.permutations(scheme.bands, scheme.rows)
    values = [hashed[run] for run in shingle_set(text, scheme.words)]
    return [
        tuple(
            min((int(factors[band, row]) * value + int(shifts[band, row])) % 2**32 for value in values)
            for row in range(scheme.rows)
        )
        for band in range(scheme.bands)
    ]


def test_keys_agree_where_all_least_hashes_of_a_band_agree() -> None:
    choose = random.Random(3)
    words = [f"w{chr(97 + number)}" for number in range(12)]
    texts = [" ".join(choose.choices(words, k=choose.randrange(2, 12))) for _ in range(120)]
    scheme = Scheme(words=2, bands=5, rows=2)
    keys, shingles, ends = sign(pa.array(texts, pa.large_string()), scheme)
    hashed: dict[tuple[str, ...], int] = {}
    for text, part in zip(texts, np.split(shingles, ends[:-1]), strict=True):
        found = words_of(text)
        runs = [tuple(found[start : start + 2]) for start in range(len(found) - 1)]
        hashed |= dict(zip(runs, part.tolist(), strict=True))
    expected = [reference_keys(text, scheme, hashed) for text in texts]
    for band in range(scheme.bands):
        pairs = {(tuple(values[band]), int(key)) for values, key in zip(expected, keys[:, band], strict=True)}
        assert len(pairs) == len({values for values, _ in pairs}) == len({key for _, key in pairs})
    assert len(np.unique(keys)) == sum(len(set(keys[:, band].tolist())) for band in range(scheme.bands))


def test_least_hashes_agree_as_often_as_similarity_says() -> None:
    """With one hash a band the share of equal keys estimates Jaccard's similarity; binomial, within five deviations."""
    scheme = Scheme(bands=400, rows=1)
    for similarity in (0.2, 0.5, 0.8, 0.95):
        ratios = []
        for seed in range(40):
            one, other = planted(seed, similarity, num_words=600)
            expected = jaccard(shingle_set(one), shingle_set(other))
            keys, _, _ = sign(pa.array([one, other], pa.large_string()), scheme)
            ratios.append((float((keys[0] == keys[1]).mean()), expected))
        found, true = np.mean(ratios, axis=0)
        assert abs(true - similarity) < 0.03
        assert abs(found - true) < 5 * np.sqrt(true * (1 - true) / (400 * 40))


# ---- pairs and components --------------------------------------------------------------------------------------------


def reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda start, stop: content[start:stop]


def reference_copies(keys: Sequence[Sequence[int]]) -> set[int]:
    """All but the first document of every component of documents with a key in common, by a walk through them."""
    holders: dict[int, list[int]] = {}
    for document, own in enumerate(keys):
        for key in filter(None, own):
            holders.setdefault(key, []).append(document)
    seen: set[int] = set()
    copies: set[int] = set()
    for document in range(len(keys)):
        if document in seen:
            continue
        waiting, component = [document], set()
        while waiting:
            current = waiting.pop()
            if current not in component:
                component.add(current)
                waiting += [other for key in filter(None, keys[current]) for other in holders[key]]
        seen |= component
        copies |= component - {document}
    return copies


def copies_of(items: Sequence[np.ndarray], partitions: int, shuffle: random.Random) -> list[list[int]]:
    """Rows left out of every item, by way of all files."""
    signatures = [reader(near.keys_to_bytes(keys)) for keys in items]
    found = []
    for partition in range(partitions):
        keys, positions = near.read_partition(signatures, partition, partitions)
        found.append(near.pairs_from_bytes(near.pairs_to_bytes(near.find_pairs(keys, positions))))
    shuffle.shuffle(found)
    content = near.find_copies(lambda: iter(found), len(items))
    return [exact.rows_of_item([reader(content)], item, len(items)).tolist() for item in range(len(items))]


@settings(max_examples=100)
@given(
    items=st.lists(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=8), min_size=1, max_size=4),
    partitions=st.sampled_from([1, 2, 64, 4096]),
    seed=st.integers(0, 99),
)
def test_the_first_of_a_component_stays(items: list[list[list[int]]], partitions: int, seed: int) -> None:
    choose = random.Random(seed)
    spread = [0, *(choose.getrandbits(64) | 1 for _ in range(9))]
    arrays = [np.array([[spread[key] for key in row] for row in item], np.uint64).reshape(-1, 3) for item in items]
    found = copies_of(arrays, partitions, random.Random(seed))
    flat = [row for array in arrays for row in array.tolist()]
    expected = reference_copies(flat)
    begins = np.cumsum([0, *map(len, arrays)]).tolist()
    assert {begins[item] + row for item, rows in enumerate(found) for row in rows} == expected


def test_number_of_partitions() -> None:
    assert [near.num_partitions(keys) for keys in (0, 2_000_000, 2_000_001, 10**7, 10**12)] == [1, 1, 2, 8, 4096]
    content = near.keys_to_bytes(np.array([[1, 2], [0, 0], [2**63, 5]], np.uint64))
    assert near.num_keys(len(content)) == 4 and near.num_keys(0) == 0


def test_an_exact_check_leaves_only_similar_pairs() -> None:
    """A bucket of everything: leaders are compared, and a document joins each one that it is like."""
    texts = [text for seed in range(4) for text in planted(seed, 0.9, num_words=300)] + list(planted(0, 0.5, 300))
    _, shingles, ends = sign(pa.array(texts, pa.large_string()), Scheme())
    content = near.shingles_to_bytes(near.shingle_sets(shingles, ends))
    read = near.shingle_reader([reader(content)])
    exact_sets = [shingle_set(text) for text in texts]
    assert [len(read(row)) for row in range(len(texts))] == [len(found) for found in exact_sets]
    pairs = near.similar_pairs(np.arange(len(texts)), read, 0.8)
    expected = {
        (one, other)
        for one in range(len(texts))
        for other in range(one + 1, len(texts))
        if jaccard(exact_sets[one], exact_sets[other]) >= 0.8
    }
    assert {(0, 1), (2, 3), (4, 5), (6, 7)} <= {tuple(pair) for pair in pairs.tolist()} <= expected
    assert pairs.size and len(near.similar_pairs(np.arange(len(texts)), read, 1.0)) == 1  # the same text twice


# ---- recall and precision --------------------------------------------------------------------------------------------


def test_recall_and_precision_on_planted_copies() -> None:
    """FineWeb's scheme finds what its formula says; what the exact check leaves is above the threshold."""
    similarities = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    labelled = [(seed, similarity) for similarity in similarities for seed in range(60)]
    pairs = [
        planted(1000 * place + seed, similarity, num_words=400) for place, (seed, similarity) in enumerate(labelled)
    ]
    texts = [text for pair in pairs for text in pair]
    scheme = Scheme()
    keys, shingles, ends = sign(pa.array(texts, pa.large_string()), scheme)
    positions = np.repeat(np.arange(len(texts)), scheme.bands)
    found = {tuple(pair) for pair in near.find_pairs(keys.reshape(-1), positions).tolist()}
    assert all(second == first + 1 and first % 2 == 0 for first, second in found)  # no pair that was not planted
    read = near.shingle_reader([reader(near.shingles_to_bytes(near.shingle_sets(shingles, ends)))])
    for similarity in similarities:
        chosen = [2 * place for place, (_, wanted) in enumerate(labelled) if wanted == similarity]
        true = [jaccard(shingle_set(texts[first]), shingle_set(texts[first + 1])) for first in chosen]
        expected = sum(map(scheme.probability, true))
        deviation = np.sqrt(sum(scheme.probability(s) * (1 - scheme.probability(s)) for s in true))
        recalled = sum((first, first + 1) in found for first in chosen)
        assert abs(recalled - expected) <= 4 * deviation + 1e-9, (similarity, recalled, expected)
        if similarity == 1.0:
            assert recalled == 60
    checked = near.find_pairs(keys.reshape(-1), positions, lambda bucket: near.similar_pairs(bucket, read, 0.75))
    assert len(checked) > 100
    for first, second in checked.tolist():
        assert jaccard(shingle_set(texts[first]), shingle_set(texts[second])) >= 0.75
    assert {pair for pair in found if jaccard(shingle_set(texts[pair[0]]), shingle_set(texts[pair[1]])) >= 0.75} == {
        tuple(pair) for pair in checked.tolist()
    }


def test_unicode_of_python_is_recent_enough() -> None:
    """The table folds characters by Python's data, which must know those that the frozen table calls letters."""
    assert int(unicodedata.unidata_version.split(".")[0]) >= 14
