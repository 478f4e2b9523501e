"""--packing best_fit: what the windows hold, against a small packing written here in plain Python.

Every token of every document once an epoch and some beginnings twice; no document cut that fits; one plan for all
processes, kept in the node's cache, whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import packed_documents
from pipeline.dataset.best_fit import pack
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.mixed_order import MixedStream
from pipeline.dataset.packed_documents import PackedDocuments, Plan, make_plan, open_plan
from pipeline.dataset.shards import TokenStream, open_split
from pipeline.storage.folders import CACHE_VARIABLE
from tests.support.shards import save_folder

BEGINS = 0  # the token that documents begin with; every other token of a stream is another number


def stream_of(lengths: list[int], head: int) -> tuple[TokenStream, list[list[int]]]:
    """A stream in two shards, and its documents, the first of which lacks its beginning where ``head`` is not 0."""
    numbers = iter(range(1, 60_000))
    documents = [[next(numbers) for _ in range(head)]] if head else []
    documents += [[BEGINS, *(next(numbers) for _ in range(length - 1))] for length in lengths]
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    half = len(tokens) // 2
    shards = [tokens[:half], tokens[half:]] if half else [tokens]
    return TokenStream(shards, vocab_size=60_000), documents


def best_fit_windows(documents: list[list[int]], length: int) -> list[list[list[int]]]:
    """Windows as lists of what they hold, packed by looking at every window for every document."""
    full: list[list[list[int]]] = []
    left: list[tuple[bool, list[int]]] = []
    for document in documents:
        cut = len(document) // length * length
        full += [[document[start : start + length]] for start in range(0, cut, length)]
        if document[cut:]:
            left.append((document[cut] != BEGINS, document[cut:]))
    windows: list[list[tuple[bool, list[int]]]] = []
    for is_rest, piece in sorted(left, key=lambda each: -len(each[1])):
        fits = [
            (length - sum(len(other) for _, other in window), window)
            for window in windows
            if sum(len(other) for _, other in window) + len(piece) <= length
            and not (is_rest and any(rest for rest, _ in window))
        ]
        if fits:
            # Of two windows that are equally full, the one that no rest can go into any more.
            _, window = min(fits, key=lambda each: (each[0], not any(rest for rest, _ in each[1])))
            window.append((is_rest, piece))
        else:
            windows.append([(is_rest, piece)])
    return full + [[piece for _, piece in sorted(window, key=lambda each: not each[0])] for window in windows]


streams = st.tuples(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(0, 50), st.integers(2, 33))


@given(given_stream=streams, group=st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_every_token_is_read_and_no_document_cut_that_fits(
    given_stream: tuple[list[int], int, int], group: int
) -> None:
    lengths, head, length = given_stream
    stream, documents = stream_of(lengths, head)
    if len(stream) < length:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_documents, "_DOCUMENTS_AT_ONCE", group)
        plan = make_plan(packed_documents.document_starts(stream, BEGINS), len(stream), length)
    groups = [documents[first : first + group] for first in range(0, len(documents), group)]
    expected = [window for each in groups for window in best_fit_windows(each, length)]
    assert plan.num_windows == len(expected)
    assert plan.num_documents == len(documents)
    assert plan.num_cut == sum(len(each) > length for each in documents)

    reads = np.zeros(len(stream), dtype=np.int64)
    for start, size in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True):
        reads[start : start + size] += 1
    assert reads.min() >= 1, "no token is left out"
    assert int((reads - 1).sum()) == plan.num_repeated == plan.num_windows * length - len(stream)

    packed = PackedDocuments(stream, plan, window_length=length)
    assert len(packed) == plan.num_windows * length
    windows = [packed.read(window * length, length).tolist() for window in range(plan.num_windows)]
    texts = ["," + ",".join(map(str, window)) + "," for window in windows]
    for document in documents:
        text = "," + ",".join(map(str, document)) + ","
        assert len(document) > length or any(text in each for each in texts), "no document is cut that fits"
    if head == 0:  # what stands behind something else in a window is the beginning of a document
        for window in windows:
            for before, token in itertools.pairwise(window):
                assert token in (before + 1, BEGINS) or before == BEGINS


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=80),
    capacity=st.integers(40, 60),
)
@settings(max_examples=200, deadline=None)
def test_windows_are_as_full_as_those_of_a_plain_best_fit(lengths: list[tuple[int, bool]], capacity: int) -> None:
    sizes, rests = [size for size, _ in lengths], [rest for _, rest in lengths]
    windows = pack(sizes, capacity, rests)
    assert sorted(number for window in windows for number in window) == list(range(len(sizes)))
    for window in windows:
        assert sum(sizes[number] for number in window) <= capacity
        assert not any(rests[number] for number in window[1:]), "a rest is at the head of its window"
    pieces = [[1] * size if rest else [BEGINS, *[1] * (size - 1)] for size, rest in lengths]
    expected = best_fit_windows(pieces, capacity)
    found = sorted(sum(sizes[number] for number in window) for window in windows)
    assert found == sorted(sum(map(len, window)) for window in expected)


def test_a_window_by_hand() -> None:
    """Windows of 6; the long document gives one and a rest of 2, at the head of the last window, which is filled up."""
    documents = [[0, 1, 2], [0, 3, 4, 5, 6, 7, 8, 9], [0, 10, 11, 12]]
    stream = TokenStream([np.array([token for each in documents for token in each], np.uint16)], vocab_size=100)
    plan = make_plan(packed_documents.document_starts(stream, BEGINS), len(stream), 6)
    packed = PackedDocuments(stream, plan, window_length=6)
    windows = [packed.read(6 * number, 6).tolist() for number in range(plan.num_windows)]
    assert windows == [[0, 3, 4, 5, 6, 7], [8, 9, 0, 10, 11, 12], [0, 1, 2, 0, 3, 4]]
    assert (plan.num_documents, plan.num_cut, plan.num_repeated) == (3, 1, 3)
    assert plan.sentence() == (
        "best-fit packing: 3 documents in 3 windows, 1 of them cut because they are longer than one; 16.667% of the "
        "tokens are beginnings of documents that fill windows up, read twice; none is cropped"
    )
    assert [packed.shard_at(place) for place in (0, 6, 8, 15)] == [
        ("shard 0", 3), ("shard 0", 9), ("shard 0", 11), ("shard 0", 3)
    ]  # fmt: skip
    with pytest.raises(IndexError, match="do not lie in one window"):
        packed.read(5, 2)


def test_a_plan_of_many_documents_is_always_the_same() -> None:
    """A run that resumes must find its windows again, in a later version too."""
    lengths = np.random.default_rng(3).integers(2, 55, 5000) ** 2
    starts = np.cumsum(np.append(0, lengths[:-1]))
    plan = make_plan(starts, int(lengths.sum()), 1025)
    digest = hashlib.sha256(plan.starts.tobytes() + plan.lengths.tobytes() + plan.firsts.tobytes())
    assert digest.hexdigest()[:16] == "2b27702662de1c09"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_folder_plan(folder: Path, length: int) -> Plan:
    return open_plan(Manifest.load(folder), open_split(folder, "train"), window_length=length)


def test_the_plan_is_made_once_and_again_where_it_is_damaged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    save_folder(tmp_path / "data", {"train_000000.bin": [0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 0], "val_000000.bin": [0, 1]})
    made = open_folder_plan(tmp_path / "data", 6)
    files = {path.name for path in next(cache.iterdir()).iterdir()} - {".lock"}
    assert files == {"plan.json", "starts.bin", "lengths.bin", "firsts.bin"}
    with monkeypatch.context() as patch:
        patch.setattr(packed_documents, "make_plan", lambda *_: pytest.fail("made again"))
        read = open_folder_plan(tmp_path / "data", 6)
    for name in ("starts", "lengths", "firsts"):
        assert np.array_equal(getattr(made, name), getattr(read, name))
    assert read.sentence() == made.sentence()
    for name, damage in (("starts.bin", b"\0" * 32), ("plan.json", b"{"), ("plan.json", b"{}")):
        next(cache.glob(f"*/{name}")).write_bytes(damage)
        again = open_folder_plan(tmp_path / "data", 6)
        assert np.array_equal(again.starts, made.starts) and "damaged" in caplog.text
        caplog.clear()
    assert open_folder_plan(tmp_path / "data", 5).num_windows != made.num_windows
    assert len(list(cache.iterdir())) == 2


def test_sources_of_a_mixture_have_windows_of_their_own(tmp_path: Path, cache: Path) -> None:
    streams = []
    for name, tokens in (("a", [0, 1, 2, 0, 3, 4, 5, 6, 7]), ("b", [0, 11, 0, 12, 13, 0, 14, 15])):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name, {"train_000000.bin": tokens, "val_000000.bin": [0, 1]})
        plan = open_folder_plan(tmp_path / name, 4)
        streams.append(PackedDocuments(open_split(tmp_path / name, "train"), plan, window_length=4))
    mixed = MixedStream([*streams], window_length=4)
    assert mixed.source_windows == (3, 3)
    for window in range(3):
        for source in range(2):
            found = mixed.read((source * 3 + window) * 4, 4)
            assert found.tolist() == streams[source].read(window * 4, 4).tolist()
    assert mixed.shard_at(12)[0] == f"{tmp_path / 'b'}/train_000000.bin"
    assert [note.split(": ")[0] for note in mixed.notes()] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert cache.is_dir()
