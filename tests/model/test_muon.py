"""Muon against torch.optim.Muon, its polynomial in float64, and the same run divided among processes."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch
from torch import Tensor, nn

from model.muon import COEFFICIENTS, Group, Muon, assign_owners, muon_groups, orthogonal_parts, orthogonalize
from model.optimizer import AdamW
from model.transformer import Transformer
from tests.support.llama_twin import lively_model, random_tokens, small_config

SHAPES = [(24, 24), (40, 16), (16, 40), (24, 24), (7, 3)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def distance(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("shape", [(24, 24), (60, 20), (20, 60), (3, 16, 48)])
def test_orthogonalize_is_its_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = u @ torch.diag_embed(values) @ v
    assert distance(orthogonalize(matrix.double(), torch.float64), expected) < 1e-6  # 1e-7 is added to the norm
    # bfloat16 rounds some 15 intermediate results by 2^-9, which the polynomial's slopes of up to 3.4 magnify.
    assert distance(orthogonalize(matrix), expected) < 15 * 2**-9 * 3.4


def test_other_coefficients_and_more_iterations_end_at_one() -> None:
    matrix = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = orthogonalize(matrix, torch.float32, coefficients=(2.0, -1.5, 0.5), iterations=12)
    assert distance(exact, u @ v) < 1e-4
    assert distance(orthogonalize(matrix, torch.float32), u @ v) > 0.05, "the usual ones end around one"


def test_settings_reach_the_step() -> None:
    """With momentum 0 the first step is the gradient made orthogonal by the settings' polynomial."""
    parameter = nn.Parameter(torch.zeros(24, 24))
    parameter.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    groups = [{"params": [parameter], "muon": True, "weight_decay": 0.0}]
    Muon(groups, lr=0.01, momentum=0.0, coefficients=(2.0, -1.5, 0.5), iterations=12).step()
    expected = orthogonalize(parameter.grad, coefficients=(2.0, -1.5, 0.5), iterations=12)
    assert torch.allclose(parameter, -0.01 * 0.2 * 24**0.5 * expected.float(), rtol=1e-6)


def test_orthogonalize_keeps_the_directions() -> None:
    matrix = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(u.T @ orthogonalize(matrix).float() @ v.T)
    assert values.min() > 0.65 and values.max() < 1.25


def test_ten_steps_equal_torch() -> None:
    ours, theirs = matrices(), matrices()
    optimizer = Muon([{"params": ours, "muon": True, "weight_decay": 0.1}], lr=0.02)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(10):
        for each, parameters in ((optimizer, ours), (reference, theirs)):
            each.param_groups[0]["lr"] = 0.02 * math.cos(step / 10)
            set_gradients(parameters, step)
            each.step()
    for mine, torchs, start in zip(ours, theirs, matrices(), strict=True):
        # Each side is off the exact polynomial by some 3 % a step, in other directions; without Nesterov's look ahead,
        # the decay or the scale the distance is 0.1 and more.
        assert distance(mine - start, torchs - start) < 0.05
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], reference.state[torchs]["momentum_buffer"])


def test_a_step_is_as_long_as_one_of_adamw() -> None:
    parameter = nn.Parameter(torch.zeros(256, 512))
    parameter.grad = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [parameter], "muon": True, "weight_decay": 0.0}], lr=0.01).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.15)


class Mailbox:
    """all_to_all between threads."""

    def __init__(self, size: int) -> None:
        self.queues = [[Queue[Tensor]() for _ in range(size)] for _ in range(size)]

    def group(self, rank: int) -> Group:
        def all_to_all(outgoing: list[Tensor], counts: list[int]) -> list[Tensor]:
            for receiver, flat in enumerate(outgoing):
                self.queues[rank][receiver].put(flat.clone())
            received = [sender[rank].get(timeout=1200) for sender in self.queues]
            assert [len(flat) for flat in received] == counts
            return received

        return Group(rank=rank, size=len(self.queues), all_to_all=all_to_all)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_processes_that_hold_rows_get_the_rows_of_the_whole(size: int) -> None:
    """Nine processes hold seven rows of one matrix: some hold none. Each matrix is computed once."""
    whole = [parameter.detach() for parameter in matrices()]
    parts = [torch.chunk(matrix, size) for matrix in whole]
    mailbox = Mailbox(size)

    def run(rank: int) -> list[Tensor]:
        own = [chunks[rank] if rank < len(chunks) else chunks[0][:0] for chunks in parts]
        return orthogonal_parts(own, SHAPES, mailbox.group(rank))

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for index, matrix in enumerate(whole):
        together = torch.cat([result[index] for result in results])
        assert distance(together, orthogonalize(matrix)) < 0.005  # batched with others, rounded otherwise


def test_work_is_divided_evenly() -> None:
    shapes = [(768, 768)] * 48 + [(2048, 768)] * 24 + [(768, 2048)] * 12
    for size in (1, 3, 4, 8):
        owners = assign_owners(shapes, size)
        cost = [0] * size
        for shape, owner in zip(shapes, owners, strict=True):
            cost[owner] += min(shape) * shape[0] * shape[1]
        assert max(cost) <= 1.05 * sum(cost) / size


def test_groups_of_the_network() -> None:
    model = Transformer(small_config(tie_embeddings=False))
    hidden, matrices_left, vectors = muon_groups(model, model.blocks, 0.1)
    assert hidden["muon"] and len(hidden["params"]) == 7 * 3
    assert {id(p) for p in matrices_left["params"]} == {id(model.embedding.weight), id(model.output.weight)}  # type: ignore[union-attr]
    assert len(vectors["params"]) == 7 and vectors["weight_decay"] == 0.0
    assert not matrices_left.get("muon") and not vectors.get("muon")


def train(model: Transformer, optimizer: AdamW, steps: range) -> float:
    for step in steps:
        tokens = random_tokens(model.config, batch=2, length=33, seed=step % 3)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def test_resumed_from_tensors_and_a_number_it_is_the_same_run() -> None:
    def fresh() -> tuple[Transformer, Muon]:
        model = lively_model(small_config())
        return model, Muon(muon_groups(model, model.blocks, 0.1), lr=3e-3)

    whole, optimizer = fresh()
    start = train(whole, optimizer, range(1))
    end = train(whole, optimizer, range(1, 12))
    assert end < start - 0.5
    first, first_optimizer = fresh()
    train(first, first_optimizer, range(5))
    second, second_optimizer = fresh()
    second.load_state_dict(first.state_dict())
    second_optimizer.init_state()
    for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert set(second_optimizer.state[mine]) == set(first_optimizer.state[theirs])
        for name, tensor in first_optimizer.state[theirs].items():
            second_optimizer.state[mine][name].copy_(tensor)
    second_optimizer.num_steps = first_optimizer.num_steps
    train(second, second_optimizer, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds the shapes \[\(3,\)\]; Muon is for matrices only"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], lr=0.1)
    with pytest.raises(ValueError, match=r"momentum is 1\.0"):
        Muon([{"params": matrices(), "muon": True}], lr=0.1, momentum=1.0)
