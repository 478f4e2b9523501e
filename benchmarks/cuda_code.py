"""What torch.compile makes of the training step for CUDA: launches, bytes and FLOPs, kernel by kernel, without running.

    python benchmarks/cuda_code.py --output FOLDER                  generates the code, then reads it
    python benchmarks/cuda_code.py --files FOLDER/forward_0.py ...  reads code that is there

Generating needs torch for CUDA and triton, and a GPU or something that is taken for one: --stand_in names a folder with
a module fakecuda that answers for it. Bytes of a kernel are Inductor's own count: each of its arguments read or written
once as far as it is used. Operations that are not Triton kernels, attention and ours, are counted and not weighed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.DOTALL | re.MULTILINE)
GIGABYTES = re.compile(r"'kernel_num_gb': ([0-9.e+-]+)")
ALLOCATION = re.compile(r"(\w+) = empty_strided_cuda\((\([\d, ]*\)),")
INPUT = re.compile(r"assert_size_stride\((\w+), (\([\d, ]*\)),")
RESHAPED = re.compile(r"(\w+) = reinterpret_tensor\(\w+, (\([\d, ]*\)),")
RENAMED = re.compile(r"(\w+) = (\w+); *del \w+")
LAUNCH = re.compile(r"(triton_\w+)\.run\(")
PRODUCT = re.compile(r"extern_kernels\.(?:mm|addmm|bmm)\((.*), out=(.+)\)")
OPERATION = re.compile(r"torch\.ops\.([\w.]+)\(")
VIEW = re.compile(r"reinterpret_tensor\(\w+, (\([\d, ]*\)), \([\d, ]*\), [^)]*\)|\b([A-Za-z_]\w*)\b(?!=)")


@dataclass(kw_only=True)
class Code:
    """What one file of generated code does."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernels, products and other operations, by name."""
    gigabytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Moved by Triton kernels, all launches of each together."""
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of matrix products, by shape."""


def read(source: str) -> Code:
    """Count what generated code launches."""
    per_launch = {}
    for name, body in KERNEL.findall(source):
        found = GIGABYTES.search(body)
        per_launch[name] = float(found.group(1)) if found else float("nan")
    code = Code()
    shapes: dict[str, Any] = {}
    for line in KERNEL.sub("", source).splitlines():
        if found := RENAMED.search(line):
            shapes[found.group(1)] = shapes.get(found.group(2), ())
        for pattern in (ALLOCATION, INPUT, RESHAPED):
            if found := pattern.search(line):
                shapes[found.group(1)] = ast.literal_eval(found.group(2))
        if found := LAUNCH.search(line):
            code.launches[found.group(1)] += 1
            code.gigabytes[found.group(1)] += per_launch.get(found.group(1), float("nan"))
        elif found := PRODUCT.search(line):
            name, flops = product(found.group(1), found.group(2), shapes)
            code.launches[name] += 1
            code.flops[name] += flops
        elif found := OPERATION.search(line):
            code.launches[found.group(1)] += 1
    return code


def product(arguments: str, out: str, shapes: dict[str, tuple[int, ...]]) -> tuple[str, float]:
    """Name and FLOPs of C = A B: twice the elements of C times the width that is summed over."""
    operands = [shape for shape in shapes_of(arguments, shapes) if len(shape) >= 2]
    result = shapes_of(out, shapes)
    rows, columns = (result or [(0, 0)])[0][-2:]
    inner = operands[-1][-2] if operands else 0
    batch = operands[-1][0] if operands and len(operands[-1]) == 3 else 1
    return f"product {rows} x {inner} x {columns}", 2.0 * batch * rows * inner * columns


def shapes_of(text: str, shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of the tensors named in an argument list, in order; of unknown ones nothing."""
    found = []
    for view, name in VIEW.findall(text):
        if view:
            found.append(ast.literal_eval(view))
        elif name in shapes:
            found.append(shapes[name])
    return found


def report(name: str, code: Code) -> str:
    total = f"{sum(code.launches.values())} launches, {sum(code.gigabytes.values()):.2f} GB in Triton kernels"
    lines = [f"{name}: {total}, {sum(code.flops.values()) / 1e12:.2f} TFLOP in products"]
    weight = code.gigabytes | {key: flops / 1e12 for key, flops in code.flops.items()}
    for key, count in sorted(code.launches.items(), key=lambda item: (item[0] in code.flops, -weight.get(item[0], 0))):
        unit = "TFLOP" if key in code.flops else "GB"
        figure = f"{weight[key]:8.3f} {unit:5}" if key in weight else " " * 14
        lines.append(f"  {figure} {count:4} x  {key[:120]}")
    return "\n".join(lines)


def generate(
    output: Path,
    *,
    num_layers: int,
    micro_batch: int,
    deterministic: bool,
    attention: str,
    documents: bool = False,
    recompute: bool = False,
) -> list[Path]:
    """Write forward_0.py and backward_1.py of the recipe's loss; nothing is launched and no memory taken.

    With ``documents``, as it is with --document_mask.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import layers
    from model.config import ModelConfig
    from model.transformer import Transformer
    from pipeline.distributed.recomputation import recompute_blocks

    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    layers.F.scaled_dot_product_attention = chosen_attention(attention)
    files: list[Path] = []
    config = ModelConfig(
        vocab_size=50_257, context_length=1024, num_layers=num_layers, num_heads=12, d_model=768, d_ff=2048
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = Transformer(config)
            tokens = torch.zeros(micro_batch, config.context_length, dtype=torch.int64)
        model.compute_dtype = torch.bfloat16
        if recompute:
            recompute_blocks(model)
        loss_of = torch.compile(model.mean_loss, dynamic=False, fullgraph=True, backend=writer(output, files))
        apart = tokens.clone() if documents else None
        loss_of(tokens, tokens.clone(), documents=apart, all_count=documents).backward()
    return files


def chosen_attention(name: str) -> Any:
    """The kernel that a GPU would choose: without one, torch would choose its plain form."""
    import torch

    def attention(queries: Any, keys: Any, values: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        if name == "cudnn":
            operation = torch.ops.aten._scaled_dot_product_cudnn_attention
            return operation(queries, keys, values, None, True, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, is_causal)[0]

    return attention


def writer(output: Path, files: list[Path]) -> Any:
    """A backend that writes Inductor's code down and computes, for shapes alone, with the graph that it is made of."""
    import copy

    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering

    output.mkdir(parents=True, exist_ok=True)

    class WrittenError(Exception):
        """The code is there: what comes next, loading it, is left out."""

    def write(lowering: Any) -> Any:
        wrapper_code = lowering.codegen()[0]
        files[-1].write_text(getattr(wrapper_code, "value", wrapper_code))
        raise WrittenError

    def compile_inner(graph: Any, inputs: Any, **options: Any) -> Any:
        kept = copy.deepcopy(graph)
        direction = "backward" if options.get("is_backward") else "forward"
        files.append(output / f"{direction}_{len(files)}.py")
        try:
            compile_fx.compile_fx_inner(graph, inputs, **options)
        except Exception as error:  # Inductor wraps what is raised inside
            if not isinstance(error, WrittenError) and not isinstance(
                error.__cause__ or error.__context__, WrittenError
            ):
                raise

        def run(arguments: Any) -> Any:
            return kept(*list(arguments))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: Any, inputs: Any) -> Any:
        GraphLowering.compile_to_module = GraphLowering._compile_to_module = write  # type: ignore[method-assign, assignment]
        settings = {"fx_graph_cache": False, "compile_threads": 1, "profile_bandwidth": True}
        settings["joint_graph_constant_folding"] = False  # it would compute on tensors that are not there
        functorch_config.enable_autograd_cache = False
        with inductor_config.patch(settings):
            return compile_fx.compile_fx(graph, inputs, inner_compile=compile_inner, config_patches=settings)

    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, nargs="+", help="Generated code that is read instead of generating it.")
    parser.add_argument("--output", type=Path, default=Path("cuda_code"), help="Folder for the generated code.")
    parser.add_argument("--stand_in", type=Path, help="Folder with a module fakecuda that is taken for a GPU.")
    parser.add_argument("--num_layers", type=int, default=12, help="Transformer blocks of the network.")
    parser.add_argument("--micro_batch", type=int, default=32, help="Windows of 1,024 tokens in one forward pass.")
    parser.add_argument("--deterministic", choices=["on", "off"], default="on", help="Repeatable operations only.")
    parser.add_argument("--attention", choices=["flash", "cudnn"], default="flash", help="The attention kernel.")
    parser.add_argument("--document_mask", action="store_true", help="Flex attention, within documents.")
    parser.add_argument("--recompute", action="store_true", help="Activations of blocks are computed again.")
    arguments = parser.parse_args()
    files = arguments.files
    if files is None:
        if arguments.stand_in is not None:
            sys.path.append(str(arguments.stand_in))
            __import__("fakecuda")
        files = generate(
            arguments.output,
            num_layers=arguments.num_layers,
            micro_batch=arguments.micro_batch,
            deterministic=arguments.deterministic == "on",
            attention=arguments.attention,
            documents=arguments.document_mask,
            recompute=arguments.recompute,
        )
    for path in files:
        print(report(path.name, read(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
