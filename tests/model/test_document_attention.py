"""Flex attention within documents beside the mask of booleans, the positions in documents, and losses where all count.

Forward passes only: on a CPU flex attention has no gradient. What is compiled for CUDA: docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from model import document_attention, transformer
from model.document_attention import positions_in
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

LENGTH = 300  # two blocks of flex attention and a part of a third
ROWS = ((140, 3, 1, 156), (300,), (1,) * 40 + (260,))
"""Lengths of the documents of each row: within blocks and across them, one alone, very short ones."""


def config_of_rows(**changes: object) -> Any:
    return small_config(context_length=LENGTH, **changes)


def documents_of_rows() -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in ROWS])


def compiled_loss(model: Transformer, tokens: Tensor, targets: Tensor, documents: Tensor) -> tuple[Tensor, str]:
    """The loss of one graph from tokens to it, without gradients, and the graph's code."""
    seen: list[str] = []

    def backend(graph: GraphModule, _: Any) -> Any:
        seen.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.mean_loss, fullgraph=True, dynamic=False, backend=backend)
        loss = compiled(tokens, targets, documents=documents, all_count=True)
    assert len(seen) == 1
    return loss, seen[0]


def test_flex_attention_is_that_of_each_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(config_of_rows(num_layers=1))
    tokens, targets = (random_tokens(model.config, batch=3, length=LENGTH, seed=seed) for seed in (1, 2))
    documents = documents_of_rows()
    plain, code = compiled_loss(model, tokens, targets, documents)
    assert "flex_attention" not in code and "scaled_dot_product_attention" in code
    monkeypatch.setattr(document_attention, "FLEX_DEVICES", ("cpu",))
    flex, code = compiled_loss(model, tokens, targets, documents)
    assert "flex_attention" in code and "scaled_dot_product_attention" not in code
    sums = [
        torch.nn.functional.cross_entropy(llama_twin(model)(part).logits[0], wanted[0], reduction="sum")
        for row, aims, lengths in zip(tokens, targets, ROWS, strict=True)
        for part, wanted in zip(row[None].split(lengths, 1), aims[None].split(lengths, 1), strict=True)
    ]
    expected = torch.stack(sums).sum() / tokens.numel()
    for found in (plain, flex):
        assert relative_error(found, expected) < ROUNDING
    with torch.no_grad():
        assert relative_error(model(tokens, targets), expected) > 1e-3, "the test can tell"


def test_uncompiled_code_takes_no_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would store all scores; so does the odd length at the end of a val set."""
    monkeypatch.setattr(document_attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(transformer, "block_mask", lambda documents: pytest.fail("flex attention, uncompiled"))
    model = lively_model(config_of_rows())
    tokens = random_tokens(model.config, batch=3, length=LENGTH)
    assert model(tokens, documents=documents_of_rows()).shape == (3, LENGTH, 203)


def test_positions_begin_at_0_in_every_document() -> None:
    expected = [[place for length in lengths for place in range(length)] for lengths in ROWS]
    assert positions_in(documents_of_rows()).tolist() == expected
    assert positions_in(torch.tensor([[3, 3, 7, 9, 9]])).tolist() == [[0, 1, 0, 0, 1]]


def test_positions_that_go_on_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE turns by differences of positions: within a document it is all the same where they begin."""
    model = lively_model(config_of_rows())
    tokens = random_tokens(model.config, batch=3, length=LENGTH)
    documents = documents_of_rows()
    with torch.no_grad():
        restarted = model(tokens, documents=documents)
        monkeypatch.setattr(transformer, "positions_in", lambda given: torch.arange(given.shape[1]).expand_as(given))
        going_on = model(tokens, documents=documents)
        monkeypatch.setattr(transformer, "positions_in", torch.zeros_like)
        without = model(tokens, documents=documents)
    assert relative_error(going_on, restarted) < ROUNDING
    assert not torch.equal(going_on, restarted)
    assert relative_error(without, restarted) > 0.1, "the test can tell"


def test_where_all_targets_count_loss_and_gradients_are_the_same() -> None:
    ours, theirs = lively_model(config_of_rows()), lively_model(config_of_rows())
    tokens, targets = (random_tokens(ours.config, batch=3, length=LENGTH, seed=seed) for seed in (1, 2))
    documents = documents_of_rows()
    losses = ours(tokens, targets, documents=documents, all_count=True), theirs(tokens, targets, documents=documents)
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(grad_of(mine), grad_of(other)) < ROUNDING
