"""The validation loss counts every token once, whatever the batch size and the number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.transformer import Transformer, init_weights
from pipeline.dataset.shards import TokenStream
from pipeline.dataset.token_counts import count_tokens
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import UserError
from pipeline.evaluation import validation
from pipeline.evaluation.validation import entropy, validation_loss

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


def workers(rank: int = 0, world_size: int = 1) -> ProcessGroup:
    return ProcessGroup(rank=rank, world_size=world_size, device=torch.device("cpu"))


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


@pytest.mark.parametrize("rank", [0, 1])
def test_the_bits_are_those_of_batch_means_added_up_as_python_floats(
    model: Transformer, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessGroup, "sum", lambda self, values: values)  # of two ranks, this one alone
    stream, found = stream_of(9 * LENGTH + 6), workers(rank, 2)
    result = validation_loss(model, stream, found, context_length=LENGTH, batch_size=2)
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    batches = {0: [[0, 2], [4, 6], [8]], 1: [[1, 3], [5, 7]]}[rank]
    total = 0.0
    with torch.no_grad():
        for windows in batches:
            chosen = torch.stack([tokens[w * LENGTH : (w + 1) * LENGTH + 1] for w in windows])
            total += model(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()).item() * (len(windows) * LENGTH)
        rest = tokens[None, 9 * LENGTH :]
        total += model(rest[:, :-1].contiguous(), rest[:, 1:].contiguous()).item() * (5 if rank == 0 else 0)
    assert result.tokens == {0: 5 * LENGTH + 5, 1: 4 * LENGTH}[rank]
    assert result.loss == total / result.tokens


class Waits(TorchDispatchMode):
    """Counts what has to wait for a device: numbers taken out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_until_the_sum(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, before_sum = Waits(), []
    sum_over_ranks = ProcessGroup.sum

    def summed(self: ProcessGroup, values: torch.Tensor) -> torch.Tensor:
        before_sum.append(len(waits.calls))
        return sum_over_ranks(self, values)

    monkeypatch.setattr(ProcessGroup, "sum", summed)
    with waits:
        torch.ones(()).item()
        assert len(waits.calls) == 1, "it is seen"
        validation_loss(model, stream_of(100), workers(), context_length=LENGTH, batch_size=2)
    assert before_sum == [1]


def test_a_gpu_copies_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        done.append("pinned")
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
        done.append((device, options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    windows, gpu = np.array([1, 2]), torch.device("cuda", 0)
    tokens = validation._read(stream_of(100), windows, length=LENGTH + 1, stride=LENGTH, device=gpu)
    assert done[-2:] == ["pinned", (gpu, {"non_blocking": True})]
    assert tokens.tolist() == [stream_of(100).read(w * LENGTH, LENGTH + 1).tolist() for w in windows]


def test_unigram_entropy_of_known_distributions() -> None:
    uniform = TokenStream([np.arange(256, dtype=np.uint16)], vocab_size=300)
    assert entropy(count_tokens(uniform)) == pytest.approx(math.log(256))
    coin = TokenStream([np.array([5, 5, 5, 9], dtype=np.uint16)], vocab_size=300)
    assert entropy(count_tokens(coin)) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
