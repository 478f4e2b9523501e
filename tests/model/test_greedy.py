"""The search for the likeliest id against float64: where int8 misleads, where ids tie, where it gives up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.decoding import Decoder
from model.greedy import FEW, GreedySearch
from tests.support.llama_twin import lively_model, small_config

pytestmark = pytest.mark.skipif(not GreedySearch.is_available(), reason="no exact products of int8 here")

DTYPES = [torch.float32, torch.bfloat16]


def likeliest(weight: Tensor, x: Tensor) -> Tensor:
    """The reference: float64, then rounded as logits are; the lowest id among equals."""
    logits = (x.double() @ weight.double().T).to(weight.dtype)
    return torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])


def random_weight(num_rows: int, width: int, seed: int, *, like_trained: bool) -> Tensor:
    """Normal numbers; like trained ones: a direction that all rows share, columns and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, width, generator=generator)
    if like_trained:
        weight *= torch.randn(width, generator=generator).exp()
        weight += 2 * torch.randn(width, generator=generator)
        weight *= (0.5 * torch.randn(num_rows, 1, generator=generator)).exp()
    return weight * 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("like_trained", [False, True])
@pytest.mark.parametrize("few", [0, FEW])  # 0: every row's own bound, always
def test_finds_the_likeliest(dtype: torch.dtype, like_trained: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.greedy.FEW", few)
    weight = random_weight(4000, 96, 0, like_trained=like_trained).to(dtype)
    search = GreedySearch(weight)
    decided = 0
    for seed in range(40):
        x = torch.randn((1, 5)[seed % 2], 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = search(x)
        decided += found is not None
        assert found is None or torch.equal(found, likeliest(weight, x))
    assert decided > 30


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_not_misled_by_int8(dtype: torch.dtype) -> None:
    """Rows so close to each other that their order in int8 is another one."""
    misled = decided = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(400, 16, generator=generator) * 0.5
        x = torch.randn(1, 16, generator=generator)
        weight[:12] = x + 0.01 * torch.randn(12, 16, generator=generator)
        weight, x = weight.to(dtype), x.to(dtype)
        search = GreedySearch(weight)
        found = search(x)
        expected = likeliest(weight, x)
        decided += found is not None
        assert found is None or torch.equal(found, expected)
        rounded = (weight.float() / search._scales[:, None]).round() * search._scales[:, None]
        misled += not torch.equal((x.float() @ rounded.T).argmax(dim=-1), expected)
    assert misled > 50 and decided > 100


def test_the_bound_holds_for_the_worst_input() -> None:
    """x along a row's own rounding error: no input of that size is approximated worse."""
    weight = random_weight(300, 64, 1, like_trained=True)
    search = GreedySearch(weight)
    rounded = (weight / search._scales[:, None]).round().double() * search._scales.double()[:, None]
    x = weight.double() - rounded  # (V, D): row r is the worst for id r
    missed = (x * x).sum(dim=1) / x.norm(dim=1)  # of the exact logit for x of length 1
    assert bool((missed <= search._errors).all())
    assert bool((missed > 0.99 * search._errors).all())  # and it is no larger than needed


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_lowest_or_no_answer(dtype: torch.dtype) -> None:
    weight = random_weight(2000, 64, 2, like_trained=False).to(dtype)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight[[7, 1500]] = x[1] / 8
    search = GreedySearch(weight)
    found = search(x[1:2])
    if dtype == torch.float32:  # the order of summation could make them differ
        assert found is None and search(x) is None
    else:  # both are rounded to the same number
        assert found is not None and found.tolist() == [7]
    assert search(x[:1]) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_up_where_many_could_be_the_likeliest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(64, generator=generator) + 0.001 * torch.randn(1000, 64, generator=generator)).to(dtype)
    x = torch.randn(1, 64, generator=generator).to(dtype)
    assert GreedySearch(weight)(x) is None
    assert GreedySearch(weight)(torch.zeros_like(x)) is None
    assert GreedySearch(weight)(torch.full_like(x, float("nan"))) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decoder_chooses_what_its_logits_say(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(small_config(tie_embeddings=False))
    rows = [[1, 2, 3], [4, 5, 6, 7]]
    for most_candidates in (1 / 8, 0.0):  # the search, then the whole product
        monkeypatch.setattr("model.greedy.MOST_CANDIDATES", most_candidates)
        ours, reference = Decoder(model, dtype=dtype), Decoder(model, dtype=dtype)
        tokens, expected = ours.add_greedy(rows), reference.add(rows).argmax(dim=-1)
        for _ in range(20):
            assert torch.equal(tokens, expected)
            tokens, expected = ours.step_greedy(tokens), reference.step(expected).argmax(dim=-1)
