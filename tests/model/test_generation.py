"""Generation against transformers' and against itself without a cache; sampling against the distribution by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.generation import generate, generate_tokens, sample_token
from model.kv_cache import KVCache
from model.transformer import Transformer
from tests.support.llama_twin import ROUNDING, lively_model, llama_twin, random_tokens, relative_error, small_config


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively_model(small_config())


def greedy_without_cache(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    """The stated rule by hand: the whole window each time; a full one is cut to its newer half."""
    length = model.config.context_length
    window, result = prompt[-length:], []
    for _ in range(num_tokens):
        if len(window) > length:
            window = window[-(length // 2) :]
        with torch.no_grad():
            result.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window = [*window, result[-1]]
    return result


@pytest.mark.parametrize("kind", [{"tie_embeddings": True}, {"tie_embeddings": False}, {"qk_norm": True}])
def test_greedy_equals_transformers(kind: dict[str, bool]) -> None:
    model = lively_model(small_config(**kind))
    prompt = random_tokens(model.config, batch=3, length=9)
    expected = llama_twin(model).generate(  # type: ignore[misc]  # transformers' own annotation of self
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=39, pad_token_id=0
    )
    assert generate(model, prompt, max_new_tokens=39, temperature=0.0, seed=0) == expected[:, 9:].tolist()


@pytest.mark.parametrize("prompt_length", [1, 9, 47, 48, 60])
def test_cache_changes_nothing_even_beyond_the_window(model: Transformer, prompt_length: int) -> None:
    prompts = random_tokens(model.config, batch=2, length=prompt_length)
    expected = [greedy_without_cache(model, prompt, 70) for prompt in prompts.tolist()]
    assert generate(model, prompts, max_new_tokens=70, temperature=0.0, seed=0) == expected


def test_window_of_one_token() -> None:
    model = lively_model(small_config(context_length=1))
    tokens = generate(model, torch.tensor([[5]]), max_new_tokens=4, temperature=0.0, seed=0)[0]
    following = model(torch.arange(model.config.vocab_size)[:, None])[:, 0].argmax(dim=-1)
    assert tokens == [int(following[token]) for token in [5, *tokens[:-1]]]


def test_logits_with_a_cache_equal_those_without(model: Transformer) -> None:
    tokens = random_tokens(model.config, batch=2, length=30)
    cache = KVCache(model.config)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([11, 1, 1, 12, 5], dim=1)]
        assert relative_error(torch.cat(pieces, dim=1), model(tokens)) < ROUNDING
    assert cache.length == 30
    with pytest.raises(ValueError, match="49 tokens exceed the model's context_length 48"):
        model(tokens[:, :19], cache=cache)


def test_seed_decides(model: Transformer) -> None:
    prompt = random_tokens(model.config, batch=1, length=5).expand(2, -1)

    def run(seed: int, noise: int) -> list[list[int]]:
        torch.manual_seed(noise)
        return generate(model, prompt, max_new_tokens=20, temperature=1.5, top_p=None, seed=seed)

    assert run(1, noise=1) == run(1, noise=2)
    assert run(1, noise=1) != run(2, noise=1)
    assert run(1, noise=1)[0] != run(1, noise=1)[1]  # equal prompts, different texts


def test_global_random_state_is_left_alone(model: Transformer) -> None:
    before = torch.random.get_rng_state()
    generate(model, torch.tensor([[1]]), max_new_tokens=3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_streaming_yields_the_same_ids(model: Transformer) -> None:
    prompt = random_tokens(model.config, batch=2, length=5)
    whole = generate(model, prompt, max_new_tokens=12, seed=3)
    stream = generate_tokens(model, prompt, max_new_tokens=1000, seed=3)
    assert torch.stack(list(itertools.islice(stream, 12)), dim=1).tolist() == whole


def test_stop_id_cuts_each_row_and_no_computing(model: Transformer) -> None:
    prompt = random_tokens(model.config, batch=3, length=5)
    whole = generate(model, prompt, max_new_tokens=15, seed=3)
    stop_id = whole[0][6]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_pre_hook(count)
    stopped = generate(model, prompt, max_new_tokens=15, seed=3, stop_id=stop_id)
    handle.remove()
    assert passes == 15
    assert len(stopped[0]) <= 6
    assert stopped == [list(itertools.takewhile(lambda token: token != stop_id, row)) for row in whole]


def test_no_tokens_asked_for(model: Transformer) -> None:
    assert generate(model, torch.tensor([[1], [2]]), max_new_tokens=0, seed=0) == [[], []]


def test_compiled_blocks_generate_uncompiled() -> None:
    model = lively_model(small_config())
    prompt = random_tokens(model.config, batch=1, length=5)
    expected = generate(model, prompt, max_new_tokens=5, temperature=0.0, seed=0)
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    for block in model.blocks:
        block.compile(backend=backend)
    assert generate(model, prompt, max_new_tokens=5, temperature=0.0, seed=0) == expected
    assert compilations == 0
    model(prompt)
    assert compilations > 0


def test_padding_is_never_sampled() -> None:
    """Padding rows are zero, so their logits would be zero: far above every real one here."""
    model = lively_model(small_config(vocab_size=65))
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.weight[0] = 1.0
        model.embedding.weight[:65, 0] = -50.0
        assert model(torch.tensor([[3]])).abs().min() > 10
    prompt = torch.arange(65)[:, None]
    rows = generate(model, prompt, max_new_tokens=10, temperature=5.0, top_p=None, seed=0)
    assert max(max(row) for row in rows) < 65
    greedy = generate(model, prompt, max_new_tokens=10, temperature=0.0, seed=0)
    assert max(max(row) for row in greedy) < 65


def distribution_by_hand(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> dict[int, float]:
    """Probability of each id that may be drawn, straight from the words of sample_token's docstring."""
    weights = {token: math.exp((logit - max(logits)) / temperature) for token, logit in enumerate(logits)}
    likeliest = sorted(weights, key=lambda token: (-weights[token], token))[:top_k]
    total = math.fsum(weights[token] for token in likeliest)
    kept: list[int] = []
    for token in likeliest:
        kept.append(token)
        if top_p is not None and math.fsum(weights[other] for other in kept) / total >= top_p:
            break
    mass = math.fsum(weights[token] for token in kept)
    return {token: weights[token] / mass for token in kept}


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda number: number / 8), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.integers(1, 96).map(lambda number: number / 97),
)
def test_draws_follow_the_distribution(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    num_draws = 4000
    rows = torch.tensor(logits).expand(num_draws, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(rows, temperature, top_k, top_p, generator).bincount(minlength=len(logits)) / num_draws
    expected = distribution_by_hand(logits, temperature, top_k, top_p)
    for token, frequency in enumerate(drawn.tolist()):
        probability = expected.get(token, 0.0)
        if probability < 1e-9:
            assert frequency == 0.0
        # Six standard deviations of a frequency, and four draws for the very rare ids.
        allowed = 6 * math.sqrt(probability * (1 - probability) / num_draws) + 4 / num_draws
        assert abs(frequency - probability) <= allowed


@pytest.mark.parametrize(
    ("weights", "top_k", "top_p", "kept"),
    [
        ([1, 1, 1, 1], None, 0.5, {0, 1}),  # two reach exactly a half
        ([1, 1, 1, 1], None, 0.51, {0, 1, 2}),
        ([1, 1, 1, 1], None, 0.01, {0}),
        ([1, 2, 8, 1, 4], None, 0.49, {2}),
        ([1, 2, 8, 1, 4], None, 0.74, {2, 4}),
        ([1, 2, 8, 1, 4], None, 0.76, {1, 2, 4}),
        ([1, 2, 8, 1, 4], None, 0.90, {0, 1, 2, 4}),
        ([1, 2, 8, 1, 4], 3, 0.55, {2}),  # 8 of the 14 that top_k leaves, though 8 of 16 in all
        ([1, 2, 8, 1, 4], 3, 0.86, {1, 2, 4}),
        ([1, 2, 8, 1, 4], 2, 0.99, {2, 4}),
    ],
)
def test_which_ids_may_be_drawn(weights: list[int], top_k: int | None, top_p: float, kept: set[int]) -> None:
    logits = torch.tensor(weights).log().expand(2000, -1)
    drawn = sample_token(logits, 1.0, top_k, top_p, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == kept
    assert set(distribution_by_hand(logits[0].tolist(), 1.0, top_k, top_p)) == kept


def test_top_k_of_equals_keeps_the_lower_ids() -> None:
    drawn = sample_token(torch.zeros(500, 10), top_k=3, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2}


# The filters' borders lie between two pairs: where one lies within a pair, which half is left out is up to rounding.
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (None, 0.85), (60, None), (150, 0.7)])
def test_rounding_that_reorders_the_likeliest_changes_no_draw(top_k: int | None, top_p: float | None) -> None:
    """Alone and among others, logits differ by rounding: of two that are nearly equal, either may be the larger."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(100, generator=source).repeat(2)  # each twice
    rounding = torch.randn(200, generator=source) * 2e-7
    ranks = [(logits + rounding).argsort(), (logits - rounding).argsort()]
    assert (ranks[0] != ranks[1]).float().mean() > 0.8
    assert len(distribution_by_hand(logits.tolist(), 1.0, top_k, top_p)) % 2 == 0
    drawn = [
        sample_token(rows.expand(500, -1), 1.0, top_k, top_p, torch.Generator().manual_seed(1))
        for rows in (logits + rounding, logits - rounding)
    ]
    assert torch.equal(*drawn)


def test_low_temperatures_end_at_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.999]]).expand(200, -1)
    for temperature in (0.0, 1e-6, 1e-300):
        assert set(sample_token(logits, temperature).tolist()) == {1}


def test_forbidden_ids_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]]).expand(500, -1)
    assert set(sample_token(logits, temperature=5.0, top_p=1.0).tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_wrong_settings_are_errors(model: Transformer, setting: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_token(torch.zeros(1, 4), **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        generate(model, torch.tensor([[1]]), max_new_tokens=1, seed=0, **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0)])
def test_prompts_need_a_token(model: Transformer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens have shape"):
        generate(model, torch.zeros(shape, dtype=torch.int64), max_new_tokens=1, seed=0)
