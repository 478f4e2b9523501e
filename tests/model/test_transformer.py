"""The whole network against transformers' Llama with the same weights, and what the padding and the start must be."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Init
from model.optimizer import AdamW, parameter_groups
from model.transformer import Block, Transformer, init_weights
from tests.support.llama_twin import (
    ROUNDING,
    grad_of,
    lively_model,
    llama_name,
    llama_twin,
    random_tokens,
    real_rows,
    relative_error,
    small_config,
)

MODEL_FOLDER = Path(__file__).parents[2] / "model"


KINDS = [
    pytest.param({"tie_embeddings": True}, id="tied"),
    pytest.param({"tie_embeddings": False}, id="untied"),
    pytest.param({"tie_embeddings": True, "qk_norm": True}, id="qk_norm"),
    pytest.param({"tie_embeddings": False, "qk_norm": True}, id="untied, qk_norm"),
]
"""The networks that there are: Llama's and, with qk_norm, Qwen3's."""


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_llama(kind: dict[str, bool]) -> None:
    model = lively_model(small_config(**kind))
    tokens = random_tokens(model.config, batch=3, length=48)
    with torch.no_grad():
        reference = llama_twin(model)(tokens).logits
        logits = model(tokens)
    assert logits.shape == (3, 48, 203)
    assert relative_error(logits, reference) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_llama(kind: dict[str, bool]) -> None:
    model = lively_model(small_config(**kind))
    twin = llama_twin(model)
    tokens = random_tokens(model.config, batch=3, length=49)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    loss = model(inputs, targets)
    loss.backward()
    reference = F.cross_entropy(twin(inputs).logits.flatten(0, 1), targets.flatten())
    reference.backward()

    assert loss.shape == ()
    assert relative_error(loss, reference) < ROUNDING
    twin_gradients = {name: grad_of(parameter) for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        ours = real_rows(model.config, name, grad_of(parameter))
        assert relative_error(ours, twin_gradients[llama_name(name)]) < ROUNDING, name


def test_theta_and_norm_eps_reach_the_layers() -> None:
    model = lively_model(small_config(theta=73.0, norm_eps=0.5))
    tokens = random_tokens(model.config, batch=2, length=48)
    with torch.no_grad():
        assert relative_error(model(tokens), llama_twin(model)(tokens).logits) < ROUNDING


def test_no_position_sees_a_later_one() -> None:
    model = lively_model(small_config())
    tokens = random_tokens(model.config, batch=1, length=20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert (before[:, 12:] - after[:, 12:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_bfloat16_weights_give_a_float32_loss_near_the_exact_one() -> None:
    model = lively_model(small_config())
    tokens = random_tokens(model.config, batch=3, length=49)
    exact = model(tokens[:, :-1], tokens[:, 1:])
    rounded = model.bfloat16()(tokens[:, :-1], tokens[:, 1:])
    rounded.backward()
    assert rounded.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of up to 4 are off by some 0.03 each, their mean over 144 targets by a twelfth.
    assert abs(rounded.item() - exact.item()) < 0.01
    assert all(grad_of(parameter).isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_padding_rows_are_inert(tie: bool) -> None:
    model = lively_model(small_config(tie_embeddings=tie))
    tokens = random_tokens(model.config, batch=2, length=33)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        for weight in padded_weights(model):
            assert weight[model.config.vocab_size :].abs().max() == 0
            weight[model.config.vocab_size :] = 1e3
        poisoned = model(tokens[:, :-1], tokens[:, 1:])
    assert poisoned.item() == loss.item()


@pytest.mark.parametrize("tie", [True, False])
def test_padding_rows_stay_zero_in_training(tie: bool) -> None:
    model = lively_model(small_config(tie_embeddings=tie))
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    tokens = random_tokens(model.config, batch=2, length=33)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    for weight in padded_weights(model):
        assert grad_of(weight)[: model.config.vocab_size].abs().max() > 0
        assert grad_of(weight)[model.config.vocab_size :].abs().max() == 0
        assert weight[model.config.vocab_size :].abs().max() == 0


def padded_weights(model: Transformer) -> list[Tensor]:
    layers = [model.embedding, model.output]
    return [layer.weight for layer in layers if layer is not None]


def test_it_learns_a_sequence_by_heart() -> None:
    model = Transformer(small_config())
    init_weights(model, seed=0)
    optimizer = AdamW(parameter_groups(model, 0.0), lr=3e-3)
    tokens = random_tokens(model.config, batch=1, length=33)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_first_loss_is_that_of_guessing() -> None:
    model = Transformer(small_config())
    init_weights(model, seed=0)
    tokens = random_tokens(model.config, batch=8, length=49)
    # Logits start with standard deviation 0.02 sqrt(D) = 0.16, which adds about its square's half, 0.013.
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(203), abs=0.05)


def test_init_statistics() -> None:
    model = Transformer(small_config(d_model=256, d_ff=512, vocab_size=1000, tie_embeddings=False))
    init_weights(model, seed=5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        values = real_rows(model.config, name, parameter)
        std = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        # From n >= 65,536 draws the std is off by 1/sqrt(2n) = 0.28 %, the mean by 1/sqrt(n); six times that will do.
        assert values.std().item() == pytest.approx(std, rel=0.017), name
        assert abs(values.mean().item()) < std * 0.024, name


def test_init_settings() -> None:
    """Each setting changes what it names, and nothing else: all else has the bits that it has without."""

    def drawn(init: Init | None) -> dict[str, Tensor]:
        model = Transformer(small_config(tie_embeddings=False, d_model=256, d_ff=704, qk_norm=True))
        init_weights(model, 3, init)
        return dict(model.state_dict())

    usual = drawn(None)
    projections = {name for name in usual if name.endswith(("o_proj.weight", "down_proj.weight"))}
    zero = drawn(Init(zero_projections=True, zero_output=True, embedding_std=1.0))
    for name, tensor in zero.items():
        if name in {*projections, "output.weight"}:
            assert not tensor.any(), name
        elif name == "embedding.weight":
            assert tensor[:203].std().item() == pytest.approx(1.0, rel=0.02)
            assert not tensor[203:].any()
        else:
            assert torch.equal(tensor, usual[name]), name
    by_width = drawn(Init(std=None))
    assert by_width["blocks.0.attention.q_proj.weight"].std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    assert by_width["blocks.1.feed_forward.down_proj.weight"].std().item() == pytest.approx(
        (3 * 704) ** -0.5 / 6**0.5, rel=0.02
    )
    assert by_width["output.weight"][:203].std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    assert torch.equal(by_width["embedding.weight"], usual["embedding.weight"])
    assert torch.equal(usual["blocks.0.attention.q_norm.weight"], torch.ones(64))


def test_blocks_that_start_at_zero_change_nothing_and_learn() -> None:
    model = Transformer(small_config(qk_norm=True))
    init_weights(model, 0, Init(zero_projections=True))
    tokens = random_tokens(model.config, batch=2, length=33)
    with torch.no_grad():
        expected = model.norm(model.embedding(tokens)) @ model.embedding.weight[:203].T
        assert torch.equal(model(tokens), expected)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for block in model.blocks:
        assert isinstance(block, Block)
        assert grad_of(block.attention.o_proj.weight).any() and grad_of(block.feed_forward.down_proj.weight).any()
        assert not grad_of(block.attention.q_proj.weight).any(), "nothing gets through a projection of zeros yet"


def test_init_depends_on_the_seed_alone() -> None:
    def weights(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        model = Transformer(small_config())
        init_weights(model, seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(3, noise=1), weights(3, noise=2))
    assert not torch.equal(weights(3, noise=1), weights(4, noise=1))


def test_a_model_built_without_memory_is_the_same_model() -> None:
    """Nothing but parameters: built on the meta device, allocated, loaded, it computes the same."""
    model = lively_model(small_config())
    with torch.device("meta"):
        twin = Transformer(model.config)
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens = random_tokens(model.config, batch=2, length=48)
    assert list(model.buffers()) == []
    assert torch.equal(model(tokens), twin(tokens))


def test_too_many_tokens_are_refused() -> None:
    model = Transformer(small_config())
    with pytest.raises(ValueError, match="49 tokens exceed the model's context_length 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))


def test_compiled_whole_equals_uncompiled() -> None:
    model = lively_model(small_config())
    tokens = random_tokens(model.config, batch=2, length=33)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = [grad_of(parameter).clone() for parameter in model.parameters()]
    model.zero_grad()
    # aot_eager traces forward and backward as the default backend does, and spares the C++ compiler.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens[:, :-1], tokens[:, 1:])
    compiled.backward()
    assert relative_error(compiled, loss) < ROUNDING
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert relative_error(grad_of(parameter), gradient) < ROUNDING


def test_the_only_ready_made_layer_is_flash_attention() -> None:
    used = set().union(*(dotted_names(ast.parse(path.read_text())) for path in MODEL_FOLDER.glob("*.py")))
    functional = {name for name in used if name.startswith("torch.nn.functional.")}
    assert functional == {"torch.nn.functional.scaled_dot_product_attention"}
    layers = {name for name in used if name.startswith("torch.nn.") and name.count(".") == 2}
    assert layers <= {"torch.nn.functional", "torch.nn.Module", "torch.nn.ModuleList", "torch.nn.Parameter"}
    ready_made = {"softmax", "log_softmax", "logsumexp", "rms_norm", "layer_norm", "embedding", "multinomial"}
    assert not {name for name in used if name.startswith("torch.") and name.split(".")[-1] in ready_made}
    assert not {name for name in used if name.startswith("?.") and name.split(".")[-1] in ready_made - {"embedding"}}


def dotted_names(tree: ast.Module) -> set[str]:
    """Every a.b.c in the source, its first part replaced by what it was imported as; ?.c where it hangs on a value."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return aliases.get(node.id, "?") if isinstance(node, ast.Name) else "?"

    imported = {name for name in aliases.values() if name.startswith("torch")}
    return imported | {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
