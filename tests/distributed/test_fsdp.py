"""Which device the weights are spread over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pipeline.distributed import fsdp
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.process_group import ProcessGroup
from tests.support.llama_twin import lively_model, small_config

CPU = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("group_of_one")
def test_weights_stay_on_the_cpu_that_was_asked_for_although_there_is_a_gpu(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))  # what fully_shard asks by itself
    monkeypatch.setattr(fsdp, "_WHOLE_UNIT_PARAMETERS", 10**9 if whole else 10)
    model = parallelize(lively_model(small_config()), CPU, dtype=torch.float32, compile_blocks=False)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.device_mesh.device_type == "cpu" and parameter.device.type == "cpu", name
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in model.parameters())
