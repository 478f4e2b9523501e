"""--recompute blocks: the same bits of loss and gradients, with less kept, alone and on two ranks, compiled or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.transformer import Block, Transformer
from pipeline.distributed import fsdp
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.recomputation import recompute_blocks
from tests.support.llama_twin import grad_of, lively_model, random_tokens, small_config
from tests.training.test_trainer import CONFIG, Run, checkpoint_tensors, run  # noqa: F401  # run is a fixture

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


def make(*, recompute: bool, compile_blocks: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    torch._dynamo.reset()
    model = lively_model(small_config())
    if recompute:
        recompute_blocks(model)
    return parallelize(model, ALONE, dtype=dtype, compile_blocks=compile_blocks)


def loss_and_kept_bytes(model: Transformer) -> tuple[Tensor, int]:
    """The loss of two windows, and the bytes that autograd keeps for backward, weights left out."""
    tokens = random_tokens(model.config, batch=2, length=49)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    return loss, sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", ["not", "whole", "block by block"])
def test_loss_and_gradients_have_the_same_bits_and_less_is_kept(
    compiled: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled without Inductor, which fuses, and so rounds to bfloat16, where it likes."""
    compile_for_real = torch.compile

    def strict(function: Any, **options: Any) -> Any:
        return compile_for_real(function, fullgraph=True, backend="aot_eager", **options)

    def strict_module(module: nn.Module, **options: Any) -> None:
        module._compiled_call_impl = strict(module._call_impl, **options)

    monkeypatch.setattr(torch, "compile", strict)
    monkeypatch.setattr(nn.Module, "compile", strict_module)
    if compiled == "block by block":
        monkeypatch.setattr(fsdp, "_WHOLE_UNIT_PARAMETERS", 10)
    models = [make(recompute=recompute, compile_blocks=compiled != "not", dtype=dtype) for recompute in (False, True)]
    (plain, all_kept), (again, few_kept) = map(loss_and_kept_bytes, models)
    plain.backward()
    again.backward()
    assert torch.equal(plain, again)
    for expected, found in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(grad_of(expected), grad_of(found))
    assert few_kept < all_kept / 3


def test_every_block_is_computed_twice_a_step_and_once_in_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(recompute=False, compile_blocks=False)
    calls = []
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.attention.register_forward_hook(lambda module, args, output, number=number: calls.append(number))
    recompute_blocks(model)
    tokens = random_tokens(model.config, batch=2, length=49)
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:])
    assert calls == [0, 1, 2]
    calls.clear()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert calls == [0, 1, 2, 2, 1, 0]


def test_a_run_on_two_ranks_has_the_same_bits(run: Run, tmp_path: Path) -> None:  # noqa: F811
    plain = run(2, "plain")
    again = run(2, "again", settings_of=dataclasses.replace(CONFIG, recompute="blocks"))
    assert plain["losses"] == again["losses"]
    expected, found = (checkpoint_tensors(tmp_path / name) for name in ("plain", "again"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    description = tmp_path / "again" / "checkpoints" / "step-000012" / "checkpoint.json"
    assert json.loads(description.read_text())["config"]["recompute"] == "blocks"
