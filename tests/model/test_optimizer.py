"""AdamW, clipping and groups against torch's own; the schedule by its promises."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.muon import Muon
from model.optimizer import (
    AdamW,
    clip_by_norm,
    clip_grad_norm,
    local_squared_norm,
    parameter_groups,
    warmup_cosine,
    warmup_linear,
)
from model.transformer import Transformer
from tests.support.llama_twin import grad_of, small_config

SHAPES = [(7, 5), (3,), (2, 3, 4), ()]


def random_parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients of very different sizes, some zero, the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, parameter in enumerate(parameters):
        scale = 0.0 if (step + index) % 7 == 0 else 10.0 ** (index * 2 - 4)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": parameters[:2], "weight_decay": 0.1, "betas": (0.9, 0.95)},
        {"params": parameters[2:], "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6},
    ]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-2 * (1 + math.cos(step / 10)) * (index + 1)
        set_gradients(parameters, step)
        optimizer.step()


def test_fifty_steps_equal_torch() -> None:
    ours, theirs = random_parameters(0), random_parameters(0)
    optimizer = AdamW(groups_of(ours), lr=1e-3)
    reference = torch.optim.AdamW(groups_of(theirs), lr=1e-3, foreach=True)
    run(optimizer, ours, range(50))
    run(reference, theirs, range(50))
    assert optimizer.num_steps == 50
    start = random_parameters(0)
    for mine, torchs, first in zip(ours, theirs, start, strict=True):
        assert (mine - first).abs().max() > 1e-2  # it went somewhere
        # Same operations in the same order; one float32 rounding a step is left for a change of order inside torch.
        torch.testing.assert_close(mine, torchs, rtol=50 * 2**-24, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[mine][name], reference.state[torchs][name], rtol=50 * 2**-24, atol=0
            )


def test_resumed_from_tensors_and_a_number_it_is_the_same_run() -> None:
    whole, parts = random_parameters(1), random_parameters(1)
    run(AdamW(groups_of(whole), lr=1e-3), whole, range(20))
    first = AdamW(groups_of(parts), lr=1e-3)
    run(first, parts, range(8))
    saved = [{name: tensor.clone() for name, tensor in first.state[parameter].items()} for parameter in parts]

    second = AdamW(groups_of(parts), lr=1e-3)
    second.init_state()
    for parameter, tensors in zip(parts, saved, strict=True):
        assert set(second.state[parameter]) == set(tensors) == {"exp_avg", "exp_avg_sq"}
        for name, tensor in tensors.items():
            second.state[parameter][name].copy_(tensor)
    second.num_steps = first.num_steps
    run(second, parts, range(8, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_resumed_from_torchs_state_dict_it_is_the_same_run() -> None:
    whole, parts = random_parameters(2), random_parameters(2)
    run(AdamW(groups_of(whole), lr=1e-3), whole, range(20))
    first = AdamW(groups_of(parts), lr=1e-3)
    run(first, parts, range(8))
    second = AdamW(groups_of(parts), lr=1e-3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, parts, range(8, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_closure_is_called_with_gradients_on() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert parameter.item() == pytest.approx(2.9)  # Adam's first step is lr long


def test_parameter_without_gradient_is_an_error() -> None:
    parameters = random_parameters(0)
    set_gradients(parameters, 1)
    parameters[1].grad = None
    with pytest.raises(ValueError, match="1 of 4 parameters have no gradient"):
        AdamW(parameters, lr=0.1).step()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
    ],
)
def test_wrong_settings_are_errors(setting: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW(random_parameters(0), **({"lr": 0.1} | setting))  # type: ignore[arg-type]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(small_config(tie_embeddings=False))
    decaying, constant = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], constant["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in constant["params"])
    assert not any("norm" in names[id(parameter)] for parameter in decaying["params"])
    assert len(constant["params"]) == 2 * 3 + 1
    assert len(decaying["params"]) == 7 * 3 + 2


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer(small_config())
    model.embedding.weight.requires_grad_(False)
    grouped = [parameter for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(grouped) == len(list(model.parameters())) - 1
    assert all(parameter is not model.embedding.weight for parameter in grouped)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_clipping_equals_torch(max_norm: float) -> None:
    ours, theirs = random_parameters(0), random_parameters(0)
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    norm = clip_grad_norm([grad_of(parameter) for parameter in ours], max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    torch.testing.assert_close(norm, expected)
    for mine, torchs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad)


def test_clipping_of_parts_equals_clipping_of_the_whole() -> None:
    """Two processes, one of them with an empty part of one tensor: each adds the other's sum of squares."""
    whole = [torch.arange(12.0), torch.full((3,), 2.0)]
    parts = [[whole[0][:8].clone(), whole[1].clone()], [whole[0][8:].clone(), whole[1][:0].clone()]]
    squares = [torch.stack([part.square().sum() for part in own]).sum() for own in parts]
    norms = [(local_squared_norm(parts[0]) + squares[1]).sqrt(), (local_squared_norm(parts[1]) + squares[0]).sqrt()]
    for own, norm in zip(parts, norms, strict=True):
        clip_by_norm(own, norm, 1.0)
    expected = clip_grad_norm(whole, 1.0)
    assert [norm.item() for norm in norms] == pytest.approx([expected.item()] * 2)
    torch.testing.assert_close(torch.cat([parts[0][0], parts[1][0]]), whole[0])
    torch.testing.assert_close(parts[0][1], whole[1])


def test_norm_of_bfloat16_gradients_is_float32() -> None:
    gradient = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    exact = gradient.double().norm().item()
    norm = clip_grad_norm([gradient], math.inf)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_clipping_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="0 gradients"):
        clip_grad_norm([], 1.0)
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm {max_norm}"):
            clip_grad_norm([torch.ones(2)], max_norm)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, float]:
    total_steps = draw(st.integers(1, 2000))
    max_lr = draw(st.floats(1e-6, 1.0))
    return {
        "max_lr": max_lr,
        "min_lr": max_lr * draw(st.floats(0, 1)),
        "warmup_steps": draw(st.integers(0, total_steps)),
        "total_steps": total_steps,
    }


@given(schedules())
def test_schedule_keeps_its_promises(schedule: dict[str, float]) -> None:
    total, warmup = int(schedule["total_steps"]), int(schedule["warmup_steps"])
    rates = [warmup_cosine(step, **schedule) for step in range(total + 3)]  # type: ignore[arg-type]
    top, bottom = schedule["max_lr"], schedule["min_lr"]
    slack = top * 1e-12
    peak = max(warmup - 1, 0)
    assert rates[peak] == pytest.approx(top, rel=1e-12)
    assert rates[0] == pytest.approx(top / max(warmup, 1), rel=1e-12)
    assert rates[0] > 0
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a + slack >= b for a, b in itertools.pairwise(rates[peak:]))
    assert all(rate <= top + slack for rate in rates)
    assert all(rate >= bottom - slack for rate in rates[peak:])
    if peak < total - 1:
        assert rates[total - 1] == pytest.approx(bottom, abs=slack)
    assert rates[total:] == pytest.approx([bottom] * 3, abs=slack)


@given(schedules())
def test_schedule_falls_symmetrically(schedule: dict[str, float]) -> None:
    """The way down is symmetric: as far above the mean of top and bottom early as below it late."""
    total, peak = int(schedule["total_steps"]), max(int(schedule["warmup_steps"]) - 1, 0)
    mean = (schedule["max_lr"] + schedule["min_lr"]) / 2
    for offset in range(0, (total - 1 - peak) // 2 + 1, max(1, (total - peak) // 20)):
        early = warmup_cosine(peak + offset, **schedule)  # type: ignore[arg-type]
        late = warmup_cosine(total - 1 - offset, **schedule)  # type: ignore[arg-type]
        if peak < total - 1:
            assert (early + late) / 2 == pytest.approx(mean, rel=1e-9)


def test_recipe_schedule() -> None:
    def rate(step: int) -> float:
        return warmup_cosine(step, max_lr=18e-4, min_lr=18e-5, warmup_steps=4000, total_steps=80_000)

    assert rate(0) == pytest.approx(4.5e-7)
    assert rate(3999) == pytest.approx(18e-4)
    assert rate(41_999) == pytest.approx((18e-4 + 18e-5) / 2)
    # A quarter of the way down cos is 1/sqrt(2).
    assert rate(22_999) == pytest.approx(18e-5 + (18e-4 - 18e-5) * (1 + math.sqrt(0.5)) / 2)
    assert rate(79_999) == pytest.approx(18e-5)


@pytest.mark.parametrize(("step", "warmup_steps", "total_steps"), [(-1, 0, 10), (0, 11, 10), (0, -1, 10), (0, 0, 0)])
def test_impossible_schedules_are_errors(step: int, warmup_steps: int, total_steps: int) -> None:
    with pytest.raises(ValueError, match=f"step {step}, warmup_steps {warmup_steps}, total_steps {total_steps}"):
        warmup_cosine(step, max_lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, total_steps=total_steps)


@pytest.mark.parametrize(
    ("warmup_steps", "decay_from", "min_lr", "rates"),
    [
        (2, 6, 0.1, [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1]),
        (2, 2, 0.2, [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2]),
        (0, 9, 0.0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]),
        (4, 10, 0.1, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.1, 0.1]),
        (10, 10, 0.1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 0.1, 0.1]),
        (0, 0, 0.0, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]),
    ],
)
def test_straight_schedules_have_the_rates_computed_by_hand(
    warmup_steps: int, decay_from: int, min_lr: float, rates: list[float]
) -> None:
    ends = {"warmup_steps": warmup_steps, "decay_from": decay_from, "total_steps": 10}
    found = [warmup_linear(step, max_lr=1.0, min_lr=min_lr, **ends) for step in range(12)]
    assert found == pytest.approx(rates, rel=1e-12)
    assert found[10:] == [min_lr, min_lr], "no rounding at the end"


@pytest.mark.parametrize(
    ("step", "warmup_steps", "decay_from", "total_steps"), [(-1, 0, 5, 10), (0, 6, 5, 10), (0, 0, 11, 10), (0, 0, 0, 0)]
)
def test_impossible_straight_schedules_are_errors(
    step: int, warmup_steps: int, decay_from: int, total_steps: int
) -> None:
    ends = {"warmup_steps": warmup_steps, "decay_from": decay_from, "total_steps": total_steps}
    with pytest.raises(ValueError, match=f"warmup_steps {warmup_steps}, decay_from {decay_from}, total_steps"):
        warmup_linear(step, max_lr=1.0, min_lr=0.1, **ends)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("muon", [False, True])
def test_a_step_that_is_not_allowed_changes_no_bit(compile: bool, muon: bool) -> None:
    parameters = [parameter for parameter in random_parameters(0) if parameter.ndim == 2 or not muon]
    groups: list[dict[str, object]] = [{"params": parameters, **({"muon": True} if muon else {})}]
    optimizer = Muon(groups, lr=1e-2, compile=compile) if muon else AdamW(groups, lr=1e-2, compile=compile)
    twins = copy.deepcopy(parameters)
    twin_groups: list[dict[str, object]] = [{"params": twins, **({"muon": True} if muon else {})}]
    twin = Muon(twin_groups, lr=1e-2, compile=compile) if muon else AdamW(twin_groups, lr=1e-2, compile=compile)
    for step in range(6):
        for tensors in (parameters, twins):
            set_gradients(tensors, step)
        if step == 3:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, math.nan if parameter.ndim == 2 else math.inf)
            optimizer.step(allowed=torch.tensor(False))
            optimizer.num_steps = 3
        else:
            optimizer.step(allowed=torch.tensor(True))
            twin.step()
    for mine, other in zip(parameters, twins, strict=True):
        assert torch.equal(mine, other)
        assert all(torch.equal(optimizer.state[mine][key], value) for key, value in twin.state[other].items())
