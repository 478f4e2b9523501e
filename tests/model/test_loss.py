"""The chunked projection and cross-entropy against torch's in float64, and that it is as small as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import loss
from model.loss import linear_cross_entropy
from model.transformer import Transformer
from tests.support.llama_twin import ROUNDING, grad_of, lively_model, random_tokens, relative_error, small_config

ROWS, WIDTH, VOCAB, PADDED = 300, 24, 203, 256


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients in float64, the products rounded to the inputs' type only where ours are."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = F.cross_entropy(x @ weight[:VOCAB].T, targets)
    value.backward()
    return value.item(), grad_of(x), grad_of(weight)


def in_chunks_of(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * PADDED * dtype.itemsize)


@pytest.mark.parametrize("rows", [1, 7, 128, 200, 1000])
def test_float32_equals_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(rows, torch.float32, monkeypatch)
    x, weight, targets = inputs()
    value = linear_cross_entropy(x, weight, targets, VOCAB)
    (value * 3).backward()  # the incoming gradient must count
    expected, grad_x, grad_weight = reference(x, weight, targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert relative_error(grad_of(x), 3 * grad_x) < ROUNDING
    assert relative_error(grad_of(weight), 3 * grad_weight) < ROUNDING
    assert grad_of(weight)[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_off_by_the_rounding_of_its_products(
    weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(64, torch.bfloat16, monkeypatch)
    x, weight, targets = inputs(torch.bfloat16)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    value = linear_cross_entropy(x, weight, targets, VOCAB)
    value.backward()
    expected, grad_x, grad_weight = reference(x, weight, targets)
    # A logit of size up to 16 is rounded by up to 2^-8 of it, 0.06, and with it each probability by 6 %; the mean over
    # 300 rows averages that out in the loss, and mostly in the gradients.
    assert value.item() == pytest.approx(expected, abs=0.01)
    for mine, exact in ((grad_of(x), grad_x), (grad_of(weight), grad_weight)):
        assert ((mine.double() - exact).norm() / exact.norm()).item() < 0.02
    assert grad_of(weight).dtype == weight_dtype


def test_padding_wins_nothing_whatever_it_holds() -> None:
    x, weight, targets = inputs()
    clean = linear_cross_entropy(x, weight, targets, VOCAB).item()
    with torch.no_grad():
        weight[VOCAB:] = 1e4
    assert linear_cross_entropy(x, weight, targets, VOCAB).item() == clean


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned, and how often matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(50, torch.float32, monkeypatch)
    x, weight, targets = inputs()
    with LargestTensor() as seen:
        linear_cross_entropy(x, weight, targets, VOCAB).backward()
    assert seen.elements == 50 * PADDED < ROWS * PADDED
    assert seen.products == 3 * 6


def test_without_gradients_there_is_one_product_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(50, torch.float32, monkeypatch)
    x, weight, targets = inputs()
    with LargestTensor() as seen, torch.no_grad():
        value = linear_cross_entropy(x, weight, targets, VOCAB)
    assert seen.products == 6
    assert value.item() == linear_cross_entropy(x, weight, targets, VOCAB).item()


def test_a_second_backward_is_refused() -> None:
    x, weight, targets = inputs()
    value = linear_cross_entropy(x, weight, targets, VOCAB)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("target", [VOCAB, -1])
def test_ids_that_do_not_exist_are_refused(target: int) -> None:
    x, weight, targets = inputs()
    targets[3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_for_compilers_equals_the_other(dtype: torch.dtype) -> None:
    x, weight, targets = (tensor.detach() for tensor in inputs(dtype))
    logits = x @ weight.T
    fused_loss, fused = loss._fused_loss_and_gradient(logits.clone(), targets, VOCAB, ROWS, True)
    plain_loss, plain = loss._loss_and_gradient(logits.clone(), targets, VOCAB, ROWS, True)
    assert fused is not None and plain is not None
    assert relative_error(fused_loss.sum(), plain_loss.sum()) < 1e-6
    one_rounding = 2**-8 if dtype == torch.bfloat16 else ROUNDING  # of the result, on either side
    assert relative_error(fused.float(), plain.float()) <= one_rounding
    assert fused[:, VOCAB:].abs().max() == plain[:, VOCAB:].abs().max() == 0


@pytest.mark.parametrize("tie", [True, False])
def test_chunks_change_no_gradient_of_the_network(tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two micro-batches, whose gradients add up."""

    def gradients(model: Transformer) -> list[Tensor]:
        for seed in (1, 2):
            tokens = random_tokens(model.config, batch=4, length=49, seed=seed)
            (model(tokens[:, :-1], tokens[:, 1:]) * 0.5).backward()
        return [grad_of(parameter) for parameter in model.parameters()]

    whole = gradients(lively_model(small_config(tie_embeddings=tie)))
    in_chunks_of(30, torch.float32, monkeypatch)
    parts = gradients(lively_model(small_config(tie_embeddings=tie)))
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(parts, whole, strict=True))


def test_equal_ids_add_up_in_float32() -> None:
    """A thousand ones: in bfloat16 256 + 1 is 256."""
    from model.layers import Embedding

    layer = Embedding(8, 4).bfloat16()
    ids = torch.full((1, 1000), 5)
    layer(ids).backward(torch.ones(1, 1000, 4, dtype=torch.bfloat16))
    assert isinstance(layer.weight, nn.Parameter)
    assert grad_of(layer.weight)[5].tolist() == [1000.0] * 4
    assert grad_of(layer.weight).sum().item() == 4000
