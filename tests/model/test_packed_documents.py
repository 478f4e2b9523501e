"""Documents packed into one row: each is computed as if it were alone, and only targets that count have a loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import loss
from model.layers import document_mask
from model.transformer import Transformer
from tests.support.llama_twin import (
    ROUNDING,
    grad_of,
    lively_model,
    llama_twin,
    random_tokens,
    relative_error,
    small_config,
)

LENGTHS = (17, 1, 20, 10)


def packed(model: Transformer) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two rows of four documents, which document each token is of, and the documents alone, (1, T) each."""
    tokens = random_tokens(model.config, batch=2, length=48)
    numbers = torch.repeat_interleave(torch.tensor([3, 4, 5, 9]), torch.tensor(LENGTHS))
    return tokens, torch.stack([numbers, numbers]), [part for row in tokens for part in row[None].split(LENGTHS, dim=1)]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": False}])
def test_logits_are_those_of_each_document_alone(changes: dict[str, bool]) -> None:
    model = lively_model(small_config(**changes))
    tokens, documents, alone = packed(model)
    with torch.no_grad():
        together = model(tokens, documents=documents)
        expected = torch.cat([model(part) for part in alone], dim=1).reshape(together.shape)
        llama = torch.cat([llama_twin(model)(part).logits for part in alone], dim=1).reshape(together.shape)
        unpacked = model(tokens)
    assert relative_error(together, expected) < ROUNDING
    assert relative_error(together, llama) < ROUNDING
    assert relative_error(unpacked, expected) > 0.1, "the test can tell"


def test_nothing_of_another_document_reaches_a_token() -> None:
    model = lively_model(small_config())
    tokens, documents, _ = packed(model)
    changed = tokens.clone()
    changed[:, : LENGTHS[0]] = random_tokens(model.config, batch=2, length=LENGTHS[0], seed=9)
    with torch.no_grad():
        before, after = (model(each, documents=documents) for each in (tokens, changed))
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])


def test_the_mask_of_a_row() -> None:
    found = document_mask(torch.tensor([[1, 1, 2, 2]]))[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("rows", [30, 1000])
@pytest.mark.parametrize("fused", [False, True])
def test_targets_that_do_not_count_add_nothing(rows: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over those that count is torch's with ignore_index, and so are its gradients."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * 256 * 4)
    if fused:  # the form for compilers, run as it is
        monkeypatch.setattr(loss, "_loss_and_gradient", loss._fused_loss_and_gradient)
    ours, theirs = lively_model(small_config()), lively_model(small_config())
    tokens, documents, _ = packed(ours)
    targets = random_tokens(ours.config, batch=2, length=48, seed=5)
    targets[torch.rand(2, 48, generator=torch.Generator().manual_seed(1)) < 0.6] = -1
    counted = int((targets >= 0).sum())
    value = ours(tokens, targets, documents=documents) * (targets.numel() / counted)
    value.backward()
    logits = theirs(tokens, documents=documents)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(grad_of(mine), grad_of(other)) < ROUNDING


def test_a_row_in_which_nothing_counts_has_no_gradient() -> None:
    model = lively_model(small_config())
    tokens, documents, _ = packed(model)
    value = model(tokens, torch.full_like(tokens, -1), documents=documents)
    value.backward()
    assert value.item() == 0
    assert all(grad_of(parameter).abs().max() == 0 for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_equals_uncompiled() -> None:
    """aot_eager: the graph that a compiler gets, without a C++ compiler."""
    model = lively_model(small_config())
    tokens, documents, _ = packed(model)
    targets = random_tokens(model.config, batch=2, length=48, seed=5).masked_fill(documents == 4, -1)
    plain = model.mean_loss(tokens, targets, documents=documents)
    compiled = torch.compile(model.mean_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    found = compiled(tokens, targets, documents=documents)
    found.backward()
    grads = [grad_of(parameter).clone() for parameter in model.parameters()]
    model.zero_grad()
    plain.backward()
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, parameter in zip(grads, model.parameters(), strict=True):
        assert relative_error(mine, grad_of(parameter)) < ROUNDING
