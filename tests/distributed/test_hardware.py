"""What the known devices can do."""

from __future__ import annotations

import pytest
import torch

from pipeline.distributed.hardware import peak_flops
from pipeline.distributed.process_group import ProcessGroup

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
    cpu = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))
    assert peak_flops(cpu, torch.float32) is None
    assert peak_flops(cpu, torch.bfloat16) is None
