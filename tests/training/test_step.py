"""The training step: one process against several, compiled against not, and that nothing waits for the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import loss, muon
from model.transformer import Transformer
from pipeline.dataset.batches import BatchLoader, BatchOrder, micro_batches
from pipeline.dataset.shards import TokenStream
from pipeline.distributed import fsdp
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.process_group import ProcessGroup
from tests.support import step_process
from tests.support.llama_twin import ROUNDING, grad_of, lively_model, random_tokens, relative_error, small_config
from tests.support.ranks import run_ranks

ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights that each optimizer reaches on three ranks."""
    folder = tmp_path_factory.mktemp("three_ranks")
    result = run_ranks("step_process.py", folder, "adamw", "muon", world_size=3)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_ranks_reach_the_weights_of_one(
    optimizer: str, three_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks: no matrix of 64 or 176 rows divides evenly, and Muon's matrices have owners elsewhere."""
    monkeypatch.setattr(muon, "orthogonalize", muon.orthogonalize)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 0)  # both are changed by train
    spread = load_file(three_ranks / f"{optimizer}.safetensors")
    alone = step_process.train(ALONE, optimizer, num_micro_batches=1)
    start = dict(lively_model(small_config()).named_parameters())
    for name, parameter in alone.named_parameters():
        moved = parameter - start[name]
        assert moved.norm() > 0
        # Adam's first steps divide by tiny second moments, which magnifies the rounding of sums in another order.
        assert ((spread[name] - parameter).norm() / moved.norm()).item() < 2e-3, name


def compiled_model(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Transformer:
    """As --compile on makes it, but a graph break is an error, and no C++ compiler is needed."""
    compile_for_real = torch.compile

    def strict(function: Any, **options: Any) -> Any:
        return compile_for_real(function, fullgraph=True, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", strict)
    dtype = changes.pop("dtype", torch.float32)
    return parallelize(lively_model(small_config(**changes)), ALONE, dtype=dtype, compile_blocks=True)


@pytest.mark.parametrize(("tie", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_way_from_tokens_to_loss_is_one_graph(
    tie: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled_model(monkeypatch, tie_embeddings=tie, dtype=dtype)
    plain = parallelize(lively_model(small_config(tie_embeddings=tie)), ALONE, dtype=dtype, compile_blocks=False)
    tokens = random_tokens(model.config, batch=2, length=49)
    losses = [each(tokens[:, :-1], tokens[:, 1:]) for each in (model, plain)]
    for each in losses:
        each.backward()
    # aot_eager keeps every rounding to bfloat16 but that of the loss's gradient, written once instead of twice.
    allowed = ROUNDING if dtype == torch.float32 else 2**-6
    assert relative_error(*losses) < ROUNDING
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert grad_of(mine).dtype == torch.float32
        assert relative_error(grad_of(mine), grad_of(theirs)) < allowed


def test_only_whole_windows_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled_model(monkeypatch)
    tokens = random_tokens(model.config, batch=2, length=49)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for length in range(2, 49, 5):
            model(tokens[:, : length - 1], tokens[:, 1:length])
        assert not torch._dynamo.utils.counters["stats"]
        model(tokens[:, :-1], tokens[:, 1:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_large_model_is_compiled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp, "_WHOLE_UNIT_PARAMETERS", 10)
    model = lively_model(small_config())
    parallelize(model, ALONE, dtype=torch.float32, compile_blocks=True)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"blocks.0", "blocks.1", "blocks.2", "loss"}


def test_bfloat16_alone_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model = parallelize(lively_model(small_config()), ALONE, dtype=torch.bfloat16, compile_blocks=False)
    tokens = random_tokens(model.config, batch=2, length=33)
    seen: list[torch.dtype] = []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {grad_of(p).dtype for p in model.parameters()} == {torch.float32}


class SlowStream(TokenStream):
    """Counts its readings, and takes its time."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__([np.arange(num_tokens, dtype=np.uint16)], vocab_size=65536)
        self.readings = 0

    def read(self, start: int, count: int) -> np.ndarray:
        self.readings += 1
        time.sleep(0.001)
        return super().read(start, count)


@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [5, 6], [3, 3, 9, 0]])
def test_what_is_read_ahead_is_what_would_be_read(steps: list[int]) -> None:
    stream = SlowStream(4000)
    order = BatchOrder(num_windows=4000 // 9, windows_per_step=7, batch_size=2, seed=3)
    place: dict[str, Any] = {"context_length": 8, "rank": 1, "world_size": 2, "device": torch.device("cpu")}
    loader = BatchLoader(stream, order, **place)
    for step in steps:
        expected = list(micro_batches(stream, order, step=step, **place))
        found = list(loader.step(step))
        assert [batch.weight for batch in found] == [batch.weight for batch in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)


def test_the_next_micro_batch_is_read_before_it_is_asked_for() -> None:
    stream = SlowStream(4000)
    order = BatchOrder(num_windows=4000 // 9, windows_per_step=4, batch_size=2, seed=3)
    loader = BatchLoader(stream, order, context_length=8, rank=0, world_size=1, device=torch.device("cpu"))
    batches = loader.step(0)
    next(batches)
    deadline = time.monotonic() + 1200
    while stream.readings < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stream.readings == 4


def test_an_error_while_reading_reaches_the_step() -> None:
    class Broken(SlowStream):
        def read(self, start: int, count: int) -> np.ndarray:
            raise OSError("the disk is gone")

    order = BatchOrder(num_windows=100, windows_per_step=4, batch_size=2, seed=3)
    loader = BatchLoader(Broken(900), order, context_length=8, rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader.step(0))
