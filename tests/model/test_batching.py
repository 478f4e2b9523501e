"""A text among others is the text alone: greedy, drawn, beyond the window; requests come and go."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model.batching import Batch, Request
from model.decoding import Decoder
from model.generation import generate, sample_token
from model.transformer import Transformer
from tests.support.llama_twin import lively_model, small_config


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively_model(small_config())


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 203, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(batch: Batch, texts: dict[Any, list[int]] | None = None) -> tuple[dict[Any, list[int]], dict[Any, str]]:
    """Every text's new tokens, and why it ended."""
    texts = {} if texts is None else texts
    reasons: dict[Any, str] = {}
    while len(batch):
        for step in batch.step():
            if step.token is not None:
                texts.setdefault(step.key, []).append(step.token)
            if step.finished:
                assert step.key not in reasons
                reasons[step.key] = step.finished
    return texts, reasons


REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0, "length": 5, "max_new_tokens": 90},  # beyond the window of 48
    {"temperature": 0.8, "length": 47, "max_new_tokens": 20},
    {"temperature": 1.0, "length": 60, "max_new_tokens": 30, "top_k": 5, "top_p": None},
    {"temperature": 1.3, "length": 1, "max_new_tokens": 60, "top_p": 0.5},
    {"temperature": 0.0, "length": 48, "max_new_tokens": 3},
]


def request(settings: dict[str, Any], number: int) -> Request:
    values = dict(settings)
    return Request(tokens=prompt(values.pop("length"), number), seed=number, **values)


def test_among_others_as_alone(model: Transformer) -> None:
    together = Batch(Decoder(model), max_texts=3)
    for number, settings in enumerate(REQUESTS):
        together.add(number, request(settings, number))
    texts, reasons = finish(together)
    for number, settings in enumerate(REQUESTS):
        alone = Batch(Decoder(model), max_texts=1)
        alone.add("x", request(settings, number))
        assert finish(alone)[0]["x"] == texts[number]
        assert len(texts[number]) == settings["max_new_tokens"] and reasons[number] == "length"


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_the_same_tokens_as_generate(model: Transformer, number: int) -> None:
    settings = REQUESTS[number]
    wanted = request(settings, number)
    batch = Batch(Decoder(model), max_texts=2)
    batch.add("other", Request(tokens=[1, 2, 3], max_new_tokens=40, seed=99))
    batch.add("x", wanted)
    expected = generate(
        model,
        torch.tensor([wanted.tokens]),
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        seed=number,
    )
    assert finish(batch)[0]["x"] == expected[0]


def test_stop_ids_and_cancelled_texts_make_room(model: Transformer) -> None:
    batch = Batch(Decoder(model), max_texts=2)
    batch.add("first", Request(tokens=prompt(5, 1), max_new_tokens=30, temperature=0.0))
    first = finish(batch)[0]["first"]
    stop = next(token for token in first if first.index(token) >= 3)
    batch.add("stops", Request(tokens=prompt(5, 1), max_new_tokens=30, temperature=0.0, stop_id=stop))
    for key in ("a", "b", "c"):
        batch.add(key, Request(tokens=prompt(9, 2), max_new_tokens=25, temperature=0.0))
    texts: dict[Any, list[int]] = {}
    for step in batch.step():
        texts.setdefault(step.key, []).append(step.token or 0)
    assert set(texts) == {"stops", "a"}
    batch.cancel("a")  # grows
    batch.cancel("c")  # waits
    batch.cancel("nobody")
    texts, reasons = finish(batch, texts)
    assert reasons == {"stops": "stop", "b": "length"}
    assert texts["stops"] == first[: first.index(stop)]
    assert batch.decoder.num_texts == 0


def test_a_text_that_comes_later_joins_the_others(model: Transformer) -> None:
    batch = Batch(Decoder(model), max_texts=4)
    batch.add("long", Request(tokens=prompt(20, 1), max_new_tokens=20, seed=1))
    texts: dict[Any, list[int]] = {}
    for _ in range(7):
        for step in batch.step():
            texts.setdefault(step.key, []).append(step.token or 0)
    batch.add("late", Request(tokens=prompt(3, 5), max_new_tokens=5, seed=2))
    keys = [{step.key for step in batch.step()} for _ in range(2)]
    assert keys == [{"long", "late"}, {"long", "late"}]


GREEDY: dict[str, Any] = {"length": 3, "max_new_tokens": 400, "temperature": 0.9}


class TimedDecoder(Decoder):
    """Every row of a step takes a second, and so does every token of a prompt."""

    seconds = 0.0

    def _advance(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        self.seconds += len(tokens)
        return super()._advance(tokens, first)

    def _read(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.seconds += sum(map(len, prompts))
        return super()._read(prompts)


def timed_batch(model: Transformer, max_texts: int) -> Batch:
    decoder = TimedDecoder(model)
    return Batch(decoder, max_texts=max_texts, clock=lambda: decoder.seconds)


def greedy_batch(model: Transformer, *, max_texts: int, groups: int, texts: int) -> Batch:
    batch = timed_batch(model, max_texts)
    for group in range(groups):
        for number in range(texts):
            batch.add((group, number), request(GREEDY, 100 * group + number), group=group)
    return batch


def test_a_short_request_takes_a_place_from_long_ones(model: Transformer) -> None:
    """Long ones hold all places for hundreds of steps. It waits for one of them to have had enough, not for its end."""
    batch = greedy_batch(model, max_texts=4, groups=6, texts=16)
    while min(group.level for group in batch._groups.values()) < 1:  # those that have had nothing go first
        batch.step()
    for number in range(5):
        batch.add("short", Request(tokens=[5], max_new_tokens=6, seed=number), group=f"client {number}")
        steps = [any(step.key == "short" for step in batch.step()) for _ in range(6)]
        assert steps == [True] * 6
        assert len(batch) == 96


@pytest.mark.parametrize("groups", [1, 20])
def test_a_short_request_takes_three_times_its_time_alone_at_most(model: Transformer, groups: int) -> None:
    """Though a step of all takes sixteen times as long as one of it alone, and all places are taken."""
    short = Request(tokens=[5], max_new_tokens=16, seed=1)
    alone = seconds_of(timed_batch(model, 16), short)
    batch = greedy_batch(model, max_texts=16, groups=groups, texts=16)
    for _ in range(100):
        batch.step()
    oldest = sorted(batch._active, key=lambda text: text.number)[:8]
    tokens = sum(group.num_tokens for group in batch._groups.values())
    ratios = [seconds_of(batch, short) / alone for _ in range(40)]
    assert statistics.median(ratios) <= 3, ratios
    assert statistics.mean(ratios) <= 4, "now and then it waits for the reading of long texts"
    kept = {*batch._active, *(text for group in batch._groups.values() for text in group.waiting)}
    assert all(text in batch._active for text in oldest if text in kept)
    assert sum(group.num_tokens for group in batch._groups.values()) - tokens > 16 * 40, "long ones go on as well"


def seconds_of(batch: Batch, wanted: Request) -> float:
    assert isinstance(batch.decoder, TimedDecoder)
    began = batch.decoder.seconds
    batch.add("wanted", wanted, group="wanted")
    while not any(step.key == "wanted" and step.finished for step in batch.step()):
        pass
    return batch.decoder.seconds - began


def test_texts_that_are_ahead_of_others_are_the_texts_that_they_are_alone(model: Transformer) -> None:
    batch = greedy_batch(model, max_texts=16, groups=2, texts=9)
    texts: dict[Any, list[int]] = {}
    alone: dict[str, list[int]] = {}
    for number in range(12):
        for _ in range(11):
            for step in batch.step():
                texts.setdefault(step.key, []).append(step.token or 0)
        name, wanted = f"short {number}", request({"length": 1 + number, "max_new_tokens": 30}, number)
        batch.add(name, wanted, group=name)
        single = Batch(Decoder(model), max_texts=1)
        single.add("x", wanted)
        alone[name] = finish(single)[0]["x"]
    ahead = [step for step in batch.step() if str(step.key).startswith("short")]
    assert ahead
    texts, _ = finish(batch, texts | {step.key: [*texts.get(step.key, []), step.token or 0] for step in ahead})
    assert {name: texts[name] for name in alone} == alone


def test_interrupted_texts_are_the_texts_that_they_are_alone(model: Transformer) -> None:
    batch = greedy_batch(model, max_texts=3, groups=4, texts=2)
    taken: list[int] = []
    interrupt = batch._interrupt

    def count(row: int) -> None:
        if len(batch._active[row].window) <= model.config.context_length:  # else it has to be read again anyway
            taken.append(row)
        interrupt(row)

    batch._interrupt = count  # type: ignore[method-assign]
    texts, reasons = finish(batch)
    assert 0 < len(taken) < 8 * 400 / 20, "each reads a window again: seldom against the tokens between"
    assert set(reasons.values()) == {"length"} and len(reasons) == 8
    for group, number in ((0, 0), (3, 1)):
        alone = Batch(Decoder(model), max_texts=1)
        alone.add("x", request(GREEDY, 100 * group + number))
        assert finish(alone)[0]["x"] == texts[group, number]
    assert batch.decoder.num_texts == 0 and not batch._groups


def test_short_requests_without_end_leave_half_of_the_places(model: Transformer) -> None:
    batch = greedy_batch(model, max_texts=4, groups=1, texts=4)
    for step in range(250):
        batch.add(f"short {step}", Request(tokens=[5], max_new_tokens=20, seed=step), group=step + 1)
        rows = sum(text.group.name == 0 for text in batch._active)
        assert rows >= 2 or step < 1
        batch.step()


def test_texts_of_one_group_never_interrupt_each_other(model: Transformer) -> None:
    batch = Batch(Decoder(model), max_texts=2)
    for number in range(5):
        batch.add(number, Request(tokens=[number + 1], max_new_tokens=40, seed=number))
    keys = [[step.key for step in batch.step()] for _ in range(39)]
    assert keys == [[0, 1]] * 39


def test_the_first_look_draws_what_sorting_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        logits = torch.randn(6, 400, generator=generator) * (0.1, 1.0, 3.0, 10.0)[trial % 4]
        if trial % 3 == 0:
            logits = (logits * 2).round() / 2  # many equals
        for temperature, top_p in ((1.0, None), (0.8, 0.9), (1.5, 0.3), (0.7, 0.999)):
            drawn = []
            for first_look in (16, 400):
                monkeypatch.setattr("model.generation.FIRST_LOOK", first_look)
                streams = [torch.Generator().manual_seed(6 * trial + row) for row in range(6)]
                drawn.append(sample_token(logits, temperature, None, top_p, streams))
            assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}, {"max_new_tokens": 0}, {"tokens": []}]
)
def test_wrong_requests_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        values: dict[str, Any] = {"tokens": [1], "max_new_tokens": 1}
        Request(**(values | wrong))
