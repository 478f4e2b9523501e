"""In how many parts the engine delivers a text, by a clock of the test's own; what it says: test_http_app.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from model.batching import Batch, Request
from model.decoding import Decoder
from pipeline.pretrained import resolve
from pipeline.serving.engine import Engine, TokenDelta
from tests.support.models import train

COUNTS = [5, 40]


@pytest.fixture(scope="module")
def ours(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> resolve.Pretrained:
    return resolve.open_model(train(tiny_data, tmp_path_factory.mktemp("run")), torch.device("cpu"))


def parts(ours: resolve.Pretrained, clock: Callable[[], float], *, stop: Sequence[str] = ()) -> list[list[TokenDelta]]:
    """The parts of two texts of one request, where the engine reads the given clock."""
    engine = Engine(Batch(Decoder(ours.model), max_texts=4), ours.tokenizer, clock=clock)
    tokens = ours.tokenizer.encode("import os")
    requests = [Request(tokens=tokens, max_new_tokens=count, seed=count) for count in COUNTS]

    async def collect() -> list[TokenDelta]:
        return [delta async for delta in engine.stream(requests, stop)]

    try:
        found = asyncio.run(collect())
    finally:
        engine.close()
    return [[delta for delta in found if delta.index == index] for index in range(len(COUNTS))]


def test_what_comes_between_two_deliveries_is_one_part(ours: resolve.Pretrained) -> None:
    """While the clock stands a request hears of its first tokens and of the end of each text, and loses nothing."""
    slow = parts(ours, itertools.count().__next__)
    fast = parts(ours, lambda: 0.0)
    assert [[delta.num_tokens for delta in text] for text in slow] == [[1] * count for count in COUNTS]
    assert [[delta.num_tokens for delta in text] for text in fast] == [[1, 4], [1, 4, 35]]
    for one, other in zip(slow, fast, strict=True):
        assert "".join(delta.text for delta in one) == "".join(delta.text for delta in other)
        assert [delta.finish_reason for delta in other] == [None] * (len(other) - 1) + ["length"]


def test_a_part_ends_at_the_stop_string_in_it(ours: resolve.Pretrained) -> None:
    whole = "".join(delta.text for delta in parts(ours, lambda: 0.0)[1])
    stop = whole[len(whole) // 2 :][:3]
    (_, text) = parts(ours, lambda: 0.0, stop=[stop])
    assert "".join(delta.text for delta in text) == whole[: whole.index(stop)]
    assert text[-1].finish_reason == "stop"
