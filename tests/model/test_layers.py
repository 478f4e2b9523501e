"""Every layer against its twin in torch or in transformers' Llama, and by the properties it was chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from model import layers
from tests.support.llama_twin import ROUNDING, grad_of, relative_error, small_config

LayerT = TypeVar("LayerT", bound=nn.Module)

BFLOAT16_ROUNDING = 2**-8
"""Half the distance between neighbouring bfloat16 numbers, relative: the error of one rounding."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: LayerT, seed: int = 0) -> LayerT:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape, seed=seed))
    return layer


def gradients_of(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a fixed random projection of the output."""
    return list(torch.autograd.grad((output * random(*output.shape, seed=99)).sum(), inputs))


def test_linear_equals_torch() -> None:
    layer = filled(layers.Linear(24, 40))
    x = random(2, 5, 24).requires_grad_()
    reference = F.linear(x, layer.weight)
    torch.testing.assert_close(layer(x), reference)
    for ours, theirs in zip(
        gradients_of(layer(x), x, layer.weight), gradients_of(reference, x, layer.weight), strict=True
    ):
        assert relative_error(ours, theirs) < ROUNDING


def test_embedding_equals_torch() -> None:
    layer = filled(layers.Embedding(30, 8))
    ids = torch.tensor([[3, 3, 29], [0, 3, 7]])  # a repeated id adds its gradients up
    reference = F.embedding(ids, layer.weight)
    assert torch.equal(layer(ids), reference)
    (ours,), (theirs,) = gradients_of(layer(ids), layer.weight), gradients_of(reference, layer.weight)
    assert relative_error(ours, theirs) < ROUNDING


def test_rms_norm_equals_llama_and_torch() -> None:
    layer = filled(layers.RMSNorm(64, eps=1e-2))
    twin = modeling_llama.LlamaRMSNorm(64, eps=1e-2)
    twin.load_state_dict(layer.state_dict())
    x = (random(2, 5, 64) * 0.1).requires_grad_()  # small, so that eps matters
    assert relative_error(layer(x), twin(x)) < ROUNDING
    assert relative_error(layer(x), F.rms_norm(x, (64,), layer.weight, 1e-2)) < ROUNDING
    ours, theirs = gradients_of(layer(x), x, layer.weight), gradients_of(twin(x), x, twin.weight)
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(ours, theirs, strict=True))


def test_rms_norm_of_bfloat16_rounds_once() -> None:
    """Off by no more than the rounding of the result: squares, their mean and the product are float32."""
    layer = filled(layers.RMSNorm(512, eps=1e-5)).bfloat16()
    x = (random(4, 512) * 100).bfloat16()
    exact = F.rms_norm(x.double(), (512,), layer.weight.double(), 1e-5)
    result = layer(x)
    assert result.dtype == torch.bfloat16
    assert ((result.double() - exact).abs() <= exact.abs() * BFLOAT16_ROUNDING * 1.001).all()


def test_swiglu_equals_llama() -> None:
    layer = filled(layers.SwiGLU(16, 44))
    twin = modeling_llama.LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=44, num_attention_heads=4))
    twin.load_state_dict(layer.state_dict())
    x = random(2, 5, 16).requires_grad_()
    assert relative_error(layer(x), twin(x)) < ROUNDING
    ours = gradients_of(layer(x), x, layer.gate_proj.weight)
    theirs = gradients_of(twin(x), x, twin.gate_proj.weight)
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(ours, theirs, strict=True))


def test_swiglu_survives_large_gates() -> None:
    layer = filled(layers.SwiGLU(4, 8))
    x = (random(3, 4) * 1e4).requires_grad_()
    assert all(gradient.isfinite().all() for gradient in gradients_of(layer(x), x, layer.gate_proj.weight))


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotary_equals_llama(theta: float) -> None:
    layer = layers.RotaryEmbedding(16, theta)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    queries, keys = random(2, 4, 100, 16, seed=1), random(2, 4, 100, 16, seed=2)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(queries, torch.arange(20, 120)[None])
    expected = modeling_llama.apply_rotary_pos_emb(queries, keys, cos, sin)
    assert relative_error(layer(queries, start=20), expected[0]) < ROUNDING
    assert relative_error(layer(keys, start=20), expected[1]) < ROUNDING


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 500), second=st.integers(0, 500), shift=st.integers(0, 500), seed=st.integers(0, 1000))
def test_rotary_products_depend_on_the_distance_alone(first: int, second: int, shift: int, seed: int) -> None:
    layer = layers.RotaryEmbedding(32, 10_000.0)
    query, key = random(1, 1, 1, 32, seed=seed), random(1, 1, 1, 32, seed=seed + 1)

    def product(query_position: int, key_position: int) -> float:
        return (layer(query, query_position) * layer(key, key_position)).sum().item()

    # An angle of up to 1,000 radians in float32 is off by up to 3e-5, on each of two vectors of length about 6.
    assert product(first + shift, second + shift) == pytest.approx(product(first, second), abs=6 * 6 * 2 * 3e-5)
    assert layer(query, first).norm().item() == pytest.approx(query.norm().item(), rel=1e-5)


def test_rotary_of_bfloat16_keeps_its_angles() -> None:
    """At position 1,001 bfloat16 angles would be those of 1,000: off by a radian."""
    layer = layers.RotaryEmbedding(16, 10_000.0)
    x = random(1, 1, 8, 16).bfloat16()
    result = layer(x, start=1001)
    exact = layer(x.float(), start=1001)
    assert result.dtype == torch.bfloat16
    assert ((result.float() - exact).abs() <= exact.abs() * BFLOAT16_ROUNDING * 1.001).all()


def test_plain_attention_equals_torch() -> None:
    queries, keys, values = (random(2, 3, 17, 8, seed=seed) for seed in range(3))
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert relative_error(layers.attention(queries, keys, values), expected) < ROUNDING


def test_plain_attention_aligns_queries_to_the_last_keys() -> None:
    queries, keys, values = (random(2, 3, 17, 8, seed=seed) for seed in range(3))
    whole = layers.attention(queries, keys, values)
    assert relative_error(layers.attention(queries[:, :, 12:], keys, values), whole[:, :, 12:]) < ROUNDING


def test_self_attention_equals_its_definition() -> None:
    config = small_config()
    layer = filled(layers.CausalSelfAttention(config))
    x = random(2, 20, config.d_model) * 0.05
    queries, keys, values = (
        F.linear(x, projection.weight).view(2, 20, config.num_heads, config.head_dim).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = layers.attention(layer.rotary(queries), layer.rotary(keys), values)
    expected = F.linear(mixed.transpose(1, 2).reshape(2, 20, config.d_model), layer.o_proj.weight)
    assert relative_error(layer(x), expected) < ROUNDING


@pytest.mark.parametrize("pieces", [[20], [7, 13], [19, 1], [1] * 20, [5, 1, 8, 6]])
def test_cached_attention_equals_one_pass(pieces: list[int]) -> None:
    config = small_config()
    layer = filled(layers.CausalSelfAttention(config))
    x = random(2, 20, config.d_model) * 0.05
    cache = layers.LayerCache(capacity=24)
    with torch.no_grad():
        result = torch.cat([layer(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
        assert relative_error(result, layer(x)) < ROUNDING
    assert cache.length == 20


def test_cache_refuses_what_does_not_fit() -> None:
    cache = layers.LayerCache(capacity=4)
    part = torch.zeros(1, 1, 3, 2)
    cache.append(part, part)
    with pytest.raises(ValueError, match="6 tokens exceed the cache's capacity of 4; 3 are in it"):
        cache.append(part, part)


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_softmax_equals_torch(dim: int, scale: float) -> None:
    x = random(6, 9) * scale
    x[0, 0] = float("-inf")
    assert relative_error(layers.softmax(x, dim), torch.softmax(x, dim)) < ROUNDING


LOGITS = {
    "ordinary": random(37, 203),
    "large": random(37, 203) * 1e4,
    "shifted up": random(37, 203) + 1e4,
    "shifted down": random(37, 203) - 1e4,
    "enormous": random(37, 203) * 1e35,
    "all equal": torch.zeros(37, 203),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("rows_at_a_time", [1, 10, 1000])
def test_cross_entropy_equals_torch(kind: str, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LOSS_CHUNK_ELEMENTS", 203 * rows_at_a_time)
    logits, targets = LOGITS[kind], torch.arange(37) * 5
    loss, gradient = value_and_gradient(logits, lambda z: layers.cross_entropy(z, targets))
    # In float64, so that only our rounding is judged; the gradient's largest entries are 1/37.
    expected, expected_gradient = value_and_gradient(logits.double(), lambda z: F.cross_entropy(z, targets))
    assert loss.dtype == torch.float32
    # A difference of two numbers of size z is rounded to 2^-24 z before anything else happens.
    resolution = logits.abs().max().item() * 2**-23
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=resolution)
    if resolution < 1e-2:  # beyond, which of two logits is the larger still counts, their exact odds do not
        assert (gradient - expected_gradient).abs().max().item() <= (2e-6 + resolution) / 37
    assert gradient.isfinite().all()


def value_and_gradient(logits: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Loss times 3 has three times the gradient: the incoming gradient must count."""
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf * 1)
    (loss * 3).backward()
    return loss.detach(), grad_of(leaf) / 3


def test_cross_entropy_leaves_out_padding_columns() -> None:
    logits = random(11, 256)
    logits[:, 203:] = 1e3  # would take all the probability
    targets = torch.arange(11)
    loss, gradient = value_and_gradient(logits, lambda z: layers.cross_entropy(z, targets, 203))
    expected, expected_gradient = value_and_gradient(logits, lambda z: F.cross_entropy(z[:, :203], targets))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, expected_gradient) < ROUNDING
    assert gradient[:, 203:].abs().max() == 0


def test_cross_entropy_of_bfloat16_computes_in_float32() -> None:
    logits, targets = random(64, 203).bfloat16(), torch.arange(64)
    loss, gradient = value_and_gradient(logits, lambda z: layers.cross_entropy(z, targets))
    expected, expected_gradient = value_and_gradient(logits.double(), lambda z: F.cross_entropy(z, targets))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == torch.bfloat16
    # Rounded when it is written, and once more by the division by three above.
    allowed = expected_gradient.abs() * BFLOAT16_ROUNDING * 2.1
    assert ((gradient.double() - expected_gradient).abs() <= allowed).all()


def test_cross_entropy_writes_the_gradient_over_the_logits() -> None:
    leaf = random(8, 16).requires_grad_()
    logits = leaf * 1
    layers.cross_entropy(logits, torch.arange(8)).backward()
    assert torch.equal(logits, grad_of(leaf))


def test_cross_entropy_refuses_a_second_backward() -> None:
    loss = layers.cross_entropy(random(8, 16).requires_grad_() * 1, torch.arange(8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("target", [203, -1])
def test_cross_entropy_refuses_ids_that_do_not_exist(target: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        layers.cross_entropy(random(1, 256), torch.tensor([target]), 203)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_gradient_has_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    """And adds in the order of the rows: a resumed run repeats it."""
    rows, ids = random(4096, 64).to(dtype), torch.arange(4096) * 7 % 30
    expected = torch.zeros(40, 64)
    for row, target in zip(rows.float(), ids.tolist(), strict=True):
        expected[target] += row
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(layers.sum_rows(rows, ids, 40), expected.to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", layers.SUM_ROWS)
def test_every_way_of_adding_the_embedding_gradient_is_right(method: str) -> None:
    rows, ids = random(500, 8).bfloat16(), torch.arange(500) * 7 % 30
    exact = torch.zeros(40, 8, dtype=torch.float64).index_add_(0, ids, rows.double())
    assert relative_error(layers.SUM_ROWS[method](rows, ids, 40), exact) <= BFLOAT16_ROUNDING
