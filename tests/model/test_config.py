"""ModelConfig: its counts against the real module and torch's own FLOP counter, its errors against their words."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.transformer import Transformer
from tests.support.llama_twin import random_tokens, real_rows, small_config

RECIPE = ModelConfig(vocab_size=50_257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048)


def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(real_rows(config, name, parameter).numel() for name, parameter in model.named_parameters())


def test_recipe_counts() -> None:
    assert RECIPE.padded_vocab_size == 50_304
    assert RECIPE.head_dim == 64
    assert RECIPE.num_parameters == 123_551_232
    assert count_parameters(RECIPE) == 123_551_232


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_heads = draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 300)),
        context_length=8,
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_heads,
        d_model=num_heads * 2 * draw(st.integers(1, 4)),
        d_ff=draw(st.integers(1, 20)),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None)
@given(configs())
def test_parameter_count_is_that_of_the_module(config: ModelConfig) -> None:
    assert config.num_parameters == count_parameters(config)
    assert config.vocab_size <= config.padded_vocab_size < config.vocab_size + 64
    assert config.padded_vocab_size % 64 == 0


@pytest.mark.parametrize("tie", [True, False])
def test_flops_are_those_torch_counts(tie: bool) -> None:
    config = small_config(vocab_size=192, tie_embeddings=tie)  # a multiple of 64: torch would count padding too
    model = Transformer(config)
    tokens = random_tokens(config, batch=2, length=33)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert counter.get_total_flops() == 2 * 32 * config.flops_per_token(context_length=32)


def test_flops_default_to_the_full_context() -> None:
    assert RECIPE.flops_per_token() == RECIPE.flops_per_token(1024) == 854_438_400


def test_dict_round_trip() -> None:
    config = small_config(theta=500.0, tie_embeddings=False)
    assert ModelConfig(**config.to_dict()) == config


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPE.d_model = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_counts_must_be_positive_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value};"):
        small_config(**{name: value})


@pytest.mark.parametrize("name", ["theta", "norm_eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_constants_must_be_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}"):
        small_config(**{name: value})


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match=r"d_model 770 .* num_heads 12; .*: 768 and 780"):
        small_config(d_model=770, num_heads=12)
    with pytest.raises(ValueError, match=r"d_model 5 .* num_heads 8; .*: 8"):
        small_config(d_model=5, num_heads=8)


def test_heads_must_be_even() -> None:
    with pytest.raises(ValueError, match=r"d_model 36 / num_heads 4 .* width 9; .* multiple of 8"):
        small_config(d_model=36, num_heads=4)
