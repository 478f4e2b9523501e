"""What the compiler makes of a training step: one graph, no cosine inside the blocks, nothing compiled twice.

Compiled for the CPU, because that is what every machine has; the graph is the same for a GPU up to the kernels chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map

from model.layers import Rotation, rotary_angles, rotate
from model.transformer import Transformer
from tests.support.llama_twin import grad_of, lively_model, random_tokens, small_config

ANGLES = re.compile(r"\b(?:cos|sin|pow|sleef\w*(?:cos|sin|pow)\w*)\s*\(|\.(?:cos|sin|pow)\(")
"""Power, cosine or sine in generated C++ or Python."""

CALL_OF_ANGLES = re.compile(r"gpt25\.rotary_angles\.default\(")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph and no count of another test, no graph from a cache: its code would not be generated, nor seen."""
    torch._dynamo.reset()
    counters.clear()
    settings = (
        torch._inductor.config.patch({"fx_graph_cache": False, "cpp.simdlen": 0}),  # scalar code compiles faster
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(error_on_recompile=True),
    )
    with settings[0], settings[1], settings[2]:
        yield


def step(model: Transformer, loss_of: Callable[[Tensor, Tensor], Tensor], seed: int) -> float:
    tokens = random_tokens(model.config, batch=2, length=49, seed=seed)
    loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("kind", [{}, {"qk_norm": True, "tie_embeddings": False}], ids=["plain", "untied, qk_norm"])
def test_a_step_in_one_piece(kind: dict[str, bool]) -> None:
    model = lively_model(small_config(num_layers=2, **kind))
    compiled = torch.compile(model.mean_loss, dynamic=False)
    first, sources = run_and_get_code(lambda: step(model, compiled, seed=1))
    code = "\n".join(sources)
    assert len(sources) == 2  # forward, backward
    assert len(CALL_OF_ANGLES.findall(code)) == 1
    assert not ANGLES.findall(code)

    later = [step(model, compiled, seed=seed) for seed in (2, 3)]  # a recompilation raises
    plain = [step(model, model.mean_loss, seed=seed) for seed in (1, 2, 3)]
    assert [first, *later] == pytest.approx(plain, rel=1e-6)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_step_in_blocks() -> None:
    """As a large sharded model is compiled: one graph serves all blocks, the angles come from outside."""
    model = lively_model(small_config())
    for block in model.blocks:
        block.compile(dynamic=False)
    first, sources = run_and_get_code(lambda: step(model, model, seed=1))
    code = "\n".join(sources)
    assert len(sources) == 2
    assert not ANGLES.findall(code)
    assert not CALL_OF_ANGLES.findall(code)
    second = step(model, model, seed=2)
    plain = lively_model(small_config())
    assert [first, second] == pytest.approx([step(plain, plain, seed=seed) for seed in (1, 2)], rel=1e-6)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_the_pattern_finds_angles_that_are_computed_inside() -> None:
    """The check can fail."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.rand(64, generator=generator)

    def inline(x: Tensor) -> Tensor:
        return x * (10_000.0**frequencies).cos() + (10_000.0**frequencies).sin()

    _, sources = run_and_get_code(torch.compile(inline, dynamic=False), torch.rand(8, 64, generator=generator))
    assert {match.strip("(.") for match in ANGLES.findall("\n".join(sources))}


def plain_rotation(x: Tensor, theta: float) -> Tensor:
    """x (B, H, T, K) turned by the formula, power, cosine and sine computed here."""
    positions = torch.arange(x.shape[2], dtype=torch.float32)
    exponents = torch.arange(0, x.shape[3], 2, dtype=torch.float32) / x.shape[3]
    angles = positions[:, None] * (1.0 / theta**exponents)
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    """Of (B, T, H, K) with angles from the operation, forward and backward, as of (B, H, T, K) without it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 100, 3, 16, generator=generator).to(dtype)
    upstream = torch.randn(2, 100, 3, 16, generator=generator).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rotation = Rotation(*rotary_angles(0, 100, 16, 500.0, x.device))
    turned = rotate(ours, rotation)
    expected = plain_rotation(theirs.transpose(1, 2), 500.0).transpose(1, 2)
    turned.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(turned, expected)
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_compilers_are_told_the_truth_about_the_angles() -> None:
    for width in (16, 2):
        torch.library.opcheck(rotary_angles, (5, 7, width, 100.0, torch.device("cpu")))


def test_angles_on_their_way_into_a_sharded_block_stay_float32() -> None:
    """FSDP casts every tensor that it finds in a module's arguments, by looking into them this way."""
    rotation = Rotation(*rotary_angles(0, 4, 8, 100.0, torch.device("cpu")))
    cast = tree_map(lambda leaf: leaf.bfloat16() if isinstance(leaf, Tensor) else leaf, (rotation, {"r": rotation}))
    assert cast == (rotation, {"r": rotation})
