"""The validation loss counts every token once, whatever the batch size and the number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.transformer import Transformer, init_weights
from pipeline.dataset.shards import TokenStream
from pipeline.distributed.fsdp import Workers
from pipeline.errors import UserError
from pipeline.evaluation.validation import unigram_entropy, validation_loss

LENGTH = 16


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(vocab_size=300, context_length=LENGTH, num_layers=2, num_heads=2, d_model=32, d_ff=64)
    model = Transformer(config)
    init_weights(model, 0)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform, so that each token's loss differs
    return model


def stream_of(num_tokens: int) -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, 300, num_tokens).astype(np.uint16)
    return TokenStream([tokens[:20], tokens[20:]], vocab_size=300)


def workers(rank: int = 0, world_size: int = 1) -> Workers:
    return Workers(rank=rank, world_size=world_size, device=torch.device("cpu"))


def reference(model: Transformer, stream: TokenStream, num_targets: int) -> float:
    """Token by token: each predicted from the tokens before it in its window."""
    tokens = torch.from_numpy(stream.read(0, num_targets + 1).astype(np.int64))
    total = 0.0
    for target in range(1, num_targets + 1):
        start = (target - 1) // LENGTH * LENGTH
        logits = model(tokens[None, start:target])[0, -1]
        total += F.cross_entropy(logits.double(), tokens[target]).item()
    return total / num_targets


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 100, 161])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_one_token_at_a_time(model: Transformer, num_tokens: int, batch_size: int) -> None:
    stream = stream_of(num_tokens)
    result = validation_loss(model, stream, workers(), context_length=LENGTH, batch_size=batch_size)
    assert result.tokens == num_tokens - 1
    assert result.loss == pytest.approx(reference(model, stream, num_tokens - 1), rel=1e-5)  # float32 sums
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_a_fixed_part_of_the_val_set(model: Transformer) -> None:
    result = validation_loss(model, stream_of(500), workers(), context_length=LENGTH, batch_size=4, max_tokens=50)
    assert result.tokens == 50
    assert result.loss == pytest.approx(reference(model, stream_of(500), 50), rel=1e-5)


def test_an_empty_val_set_is_an_error(model: Transformer) -> None:
    with pytest.raises(UserError, match="val set is empty"):
        validation_loss(model, stream_of(1), workers(), context_length=LENGTH, batch_size=4)


def test_the_mode_of_the_model_is_kept(model: Transformer) -> None:
    model.train()
    validation_loss(model, stream_of(40), workers(), context_length=LENGTH, batch_size=4)
    assert model.training


def test_unigram_entropy_of_known_distributions() -> None:
    uniform = TokenStream([np.arange(256, dtype=np.uint16)], vocab_size=300)
    assert unigram_entropy(uniform) == pytest.approx(math.log(256))
    coin = TokenStream([np.array([5, 5, 5, 9], dtype=np.uint16)], vocab_size=300)
    assert unigram_entropy(coin) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
