"""The decoder against the network that it repeats, and against transformers' generate."""

from __future__ import annotations

import pytest
import torch

from model.decoding import Decoder
from model.transformer import Transformer
from tests.support.llama_twin import ROUNDING, lively_model, llama_twin, relative_error, small_config


@pytest.fixture(
    scope="module",
    params=[{"tie_embeddings": True}, {"tie_embeddings": False}, {"qk_norm": True}],
    ids=["tied", "untied", "qk_norm"],
)
def model(request: pytest.FixtureRequest) -> Transformer:
    return lively_model(small_config(**request.param, context_length=200))


def random_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 203, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def check(model: Transformer, rows: list[list[int]], logits: torch.Tensor) -> None:
    assert logits.shape == (len(rows), 203) and logits.dtype == torch.float32
    for row, found in zip(rows, logits, strict=True):
        assert relative_error(found, model(torch.tensor([row]))[0, -1]) < ROUNDING


def test_texts_of_different_lengths_grow_as_each_would_alone(model: Transformer) -> None:
    rows = random_rows(5, 131, 1, 30)  # beyond the first capacity
    decoder = Decoder(model)
    check(model, rows, decoder.add(rows))
    for step in range(6):
        tokens = torch.tensor([(7 * step + 31 * index) % 203 for index in range(len(rows))])
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        check(model, rows, decoder.step(tokens))
    assert decoder.lengths == [11, 137, 7, 36]


def test_texts_come_and_go(model: Transformer) -> None:
    rows = random_rows(3, 9, 140)
    decoder = Decoder(model)
    decoder.add(rows)
    decoder.remove(0)
    rows = [rows[2], rows[1]]  # the last takes the place
    more = random_rows(17, 2)
    check(model, more, decoder.add(more))
    rows += more
    tokens = torch.tensor([4, 5, 6, 7])
    rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
    check(model, rows, decoder.step(tokens))
    for _ in range(4):
        decoder.remove(0)
    fresh = random_rows(8)
    check(model, fresh, decoder.add(fresh))


def test_the_last_rows_go_ahead_and_rows_change_places(model: Transformer) -> None:
    rows = random_rows(9, 131, 3, 1)
    decoder = Decoder(model)
    decoder.add(rows)
    for step, (first, row, other) in enumerate([(2, 0, 3), (0, 1, 1), (3, 2, 3), (1, 0, 2), (0, 3, 0), (2, 1, 2)]):
        tokens = torch.arange(4 - first) + 10 * step
        rows[first:] = [[*each, token] for each, token in zip(rows[first:], tokens.tolist(), strict=True)]
        check(model, rows[first:], decoder.step(tokens, first))
        decoder.swap(row, other)
        rows[row], rows[other] = rows[other], rows[row]
    assert decoder.lengths == [len(each) for each in rows]


def test_a_decoder_for_one_text(model: Transformer) -> None:
    """It works in tensors that are made once, while it is alone; with another beside it, and alone again."""
    decoder = Decoder(model, texts=1)
    rows = random_rows(125)
    check(model, rows, decoder.add(rows))
    for token in range(6):  # beyond the first capacity
        rows = [[*rows[0], token]]
        check(model, rows, decoder.step(torch.tensor([token])))
    more = random_rows(3)
    check(model, more, decoder.add(more))
    rows = [[*rows[0], 7], [*more[0], 8]]
    check(model, rows, decoder.step(torch.tensor([7, 8])))
    decoder.remove(0)
    rows = [[*rows[1], 9]]
    check(model, rows, decoder.step(torch.tensor([9])))


@pytest.mark.parametrize("texts", [1, 16])
def test_greedy_equals_transformers(model: Transformer, texts: int) -> None:
    prompt = torch.tensor(random_rows(12, 12))
    expected = llama_twin(model).generate(  # type: ignore[misc]  # transformers' own annotation of self
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=150, pad_token_id=0
    )
    decoder = Decoder(model, texts=texts)
    found = [decoder.add_greedy(prompt.tolist())]
    while len(found) < 150:
        found.append(decoder.step_greedy(found[-1]))
    assert torch.equal(torch.stack(found, dim=1), expected[:, 12:])


def test_bf16_stays_close(model: Transformer) -> None:
    rows = random_rows(5, 60)
    decoder = Decoder(model, dtype=torch.bfloat16)
    decoder.add(rows)
    found = decoder.step(torch.tensor([1, 2]))
    with torch.no_grad():
        for row, token, logits in zip(rows, (1, 2), found, strict=True):
            # bfloat16 has 8 bits: 3 layers of rounding by 1/256 each; a wrong formula misses by more than a half.
            assert relative_error(logits, model(torch.tensor([[*row, token]]))[0, -1]) < 0.1


def test_a_full_context_and_empty_prompts_are_errors(model: Transformer) -> None:
    decoder = Decoder(model)
    wrong: list[list[list[int]]] = [[], [[]], [[1], []], [[1] * 201]]
    for rows in wrong:
        with pytest.raises(ValueError, match="each must have 1 to 200"):
            decoder.add(rows)
    decoder.add([[1] * 200, [1]])
    with pytest.raises(ValueError, match="context_length of 200"):
        decoder.step(torch.tensor([1, 1]))
