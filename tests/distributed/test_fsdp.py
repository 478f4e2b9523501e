"""Which device the weights are spread over, and what the known devices can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pipeline.distributed import fsdp
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.hardware import peak_flops
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


# By the data sheets, dense, in TFLOP/s. None: another rate than any that is known.
NAMES = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H20": None,
    "NVIDIA H800": None,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": None,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A10": None,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": None,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize(("name", "teraflops"), NAMES.items())
def test_a_gpu_s_peak_goes_by_its_whole_name(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    workers = ProcessGroup(rank=1, world_size=4, device=torch.device("cuda", 1))
    expected = None if teraflops is None else pytest.approx(4e12 * teraflops)
    assert peak_flops(workers, torch.bfloat16) == expected
    assert peak_flops(workers, torch.float32) is None, "the table is of bfloat16"


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(CPU, torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None
