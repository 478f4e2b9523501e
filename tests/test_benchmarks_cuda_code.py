"""benchmarks/cuda_code.py reads generated code: launches, bytes and FLOPs of a piece written by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = """
triton_poi_add_0 = async_compile.triton('triton_poi_add_0', '''
    inductor_meta={'kernel_num_gb': 0.25},
def triton_poi_add_0(in_ptr0): pass
''', device_str='cuda')

def call(args):
    primals_1, primals_2 = args
    assert_size_stride(primals_1, (1000, 2000), (2000, 1))
    buf0 = empty_strided_cuda((1000, 4000), (4000, 1), torch.bfloat16)
    extern_kernels.mm(primals_1, reinterpret_tensor(primals_2, (2000, 4000), (1, 2000), 0), out=buf0)
    buf1 = buf0; del buf0  # reuse
    triton_poi_add_0.run(buf1, 4000000, stream=stream0)
    triton_poi_add_0.run(buf1, 4000000, stream=stream0)
    buf2 = reinterpret_tensor(buf1, (500, 8000), (8000, 1), 0); del buf1  # reuse
    buf3 = empty_strided_cuda((500, 500), (500, 1), torch.bfloat16)
    extern_kernels.mm(buf2, reinterpret_tensor(buf2, (8000, 500), (1, 8000), 0), out=buf3)
    torch.ops.gpt25.sum_rows.default(buf3, primals_2, 7)
"""


def test_launches_bytes_and_flops_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "forward_0.py"
    file.write_text(GENERATED)
    command = [sys.executable, "benchmarks/cuda_code.py", "--files", str(file)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=1200).stdout
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines == [
        "forward_0.py: 5 launches, 0.50 GB in Triton kernels, 0.02 TFLOP in products",
        "0.500 GB 2 x triton_poi_add_0",
        "1 x gpt25.sum_rows.default",
        "0.016 TFLOP 1 x product 1000 x 2000 x 4000",
        "0.004 TFLOP 1 x product 500 x 8000 x 500",
    ]
