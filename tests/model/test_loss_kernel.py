"""The Triton kernel of the loss: its numbers by Triton's interpreter on a CPU, and what compilers are told of it.

That it runs on a GPU, benchmarks/gpu.py checks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model
from model import loss
from model.loss import linear_cross_entropy, write_gradient_
from tests.support.llama_twin import ROUNDING, grad_of, relative_error

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(5, 256, 203), (3, 16_448, 16_400), (2, 50_304, 50_257), (4, 192, 192)]
"""Rows, columns, vocabulary: below one block of columns, with whole blocks, the recipe's, without padding."""


def chunk(rows: int, columns: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose padding would win, and targets, the last id among them."""
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, columns, generator=generator) * 4).to(dtype)
    logits[:, vocab_size:] = 1e4
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    targets[0] = vocab_size - 1
    return logits, targets


def compare_with_torch(rows: int, columns: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Fails where the kernel differs from torch's cross-entropy in float64; run where TRITON_INTERPRET is set."""
    from model import loss_kernel

    logits, targets = chunk(rows, columns, vocab_size, dtype)
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().div(7).backward()

    losses = loss_kernel.write_gradient(logits, targets, vocab_size, 7, False)
    assert torch.equal(logits, chunk(rows, columns, vocab_size, dtype)[0])
    assert torch.equal(losses, loss_kernel.write_gradient(logits, targets, vocab_size, 7, True))
    assert relative_error(losses, expected.detach()) < 1e-6
    # The interpreter cuts bfloat16 off where a GPU rounds: an error of a whole place, not of half of one.
    allowed = grad_of(exact).abs() * (2**-7 if dtype == torch.bfloat16 else ROUNDING) + 1e-9
    assert ((logits[:, :vocab_size].double() - grad_of(exact)).abs() <= allowed).all()
    assert (logits[:, vocab_size:] == 0).all()


def check_targets_that_do_not_exist() -> None:
    """Their losses are NaN and those of other rows are not; run where TRITON_INTERPRET is set."""
    from model import loss_kernel

    logits, targets = chunk(4, 256, 203, torch.float32)
    targets[1], targets[2] = 203, -1
    assert loss_kernel.write_gradient(logits, targets, 203, 4, True).isnan().tolist() == [False, True, True, False]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_equals_torch() -> None:
    code = (
        "import torch\n"
        "from tests.model.test_loss_kernel import SHAPES, check_targets_that_do_not_exist, compare_with_torch\n"
        "for shape in SHAPES:\n"
        "    for dtype in (torch.float32, torch.bfloat16): compare_with_torch(*shape, dtype)\n"
        "check_targets_that_do_not_exist()\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=1200)


def plain_kernel(logits: Tensor, targets: Tensor, vocab_size: int, num_rows: int, with_gradients: bool) -> Tensor:
    """What the kernel does, by torch."""
    real = logits[:, :vocab_size].float()
    losses = F.cross_entropy(real, targets, reduction="none")
    if with_gradients:
        gradient = (real.softmax(dim=1) - F.one_hot(targets, vocab_size)) / num_rows
        logits.zero_()[:, :vocab_size] = gradient
    return losses


@pytest.fixture
def kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, the kernel's place taken by plain operations."""
    stand_in = SimpleNamespace(write_gradient=plain_kernel)
    monkeypatch.setitem(sys.modules, "model.loss_kernel", stand_in)
    monkeypatch.setattr(model, "loss_kernel", stand_in, raising=False)
    monkeypatch.setattr(loss, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 64 * 256 * 4)  # several chunks


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=generator).requires_grad_()
    weight = torch.randn(256, 24, generator=generator).requires_grad_()
    return x, weight, torch.randint(0, 203, (300,), generator=generator)


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.usefixtures("kernel_on_cpu")
def test_the_network_takes_what_the_kernel_writes(backend: str | None) -> None:
    """Eager and compiled: the gradient lies where the logits were, and a compiler knows."""
    torch._dynamo.reset()
    function = linear_cross_entropy
    if backend is not None:
        function = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    x, weight, targets = inputs()
    value = function(x, weight, targets, 203)
    value.backward()
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    expected = F.cross_entropy(exact_x @ exact_weight[:203].T, targets)
    expected.backward()
    assert relative_error(value, expected) < ROUNDING
    assert relative_error(grad_of(x), grad_of(exact_x)) < ROUNDING
    assert relative_error(grad_of(weight), grad_of(exact_weight)) < ROUNDING
    with torch.no_grad():
        assert torch.equal(function(x, weight, targets, 203), value)


@pytest.mark.usefixtures("kernel_on_cpu")
def test_compilers_are_told_the_truth_about_the_kernel() -> None:
    logits, targets = chunk(5, 256, 203, torch.float32)
    torch.library.opcheck(write_gradient_, (logits, targets, 203, 5, True))
    torch.library.opcheck(write_gradient_, (logits, targets, 203, 5, False))


def test_compiled_losses_of_targets_that_do_not_exist_are_not_finite() -> None:
    logits, targets = chunk(4, 256, 203, torch.float32)
    for target in (203, -1, 300):
        targets[1] = target
        assert loss._fused_loss_and_gradient(logits, targets, 203, 4, True)[0].sum().isnan()
