"""The gradient of the embedding, by each way there is: how long, how exact, the same bits every time?

    python benchmarks/embedding_gradient.py [--device cuda]

Ids as frequent as words are (Zipf: the k-th most frequent has a share proportional to 1 / k), for 32 windows of 1,024
tokens, 50,304 rows of 768, gradients in bfloat16; and ids that are all equally frequent. Part of benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.measuring import median_seconds
from benchmarks.results import Results, add_result_arguments
from model.layers import sum_rows
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.process_group import init_distributed

RUNS = 3
"""Whose bits are compared."""

Way = Callable[[Tensor, Tensor, int], Tensor]
"""From rows (N, D), ids (N,) and num_rows to the sums (num_rows, D)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rows", type=int, default=32 * 1024, help="gradients, one a token")
    parser.add_argument("--vocab_size", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=768)
    add_result_arguments(parser)
    arguments = parser.parse_args()
    results = Results(arguments.jsonl, arguments.label)
    device = init_distributed(arguments.device).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(arguments.rows, arguments.width, generator=generator).to(device, torch.bfloat16)
    print(f"{'':46}{'ms':>9}{'error':>10}  same bits in {RUNS} runs")
    for kind in ("zipf", "uniform"):
        ids = draw_ids(kind, arguments.rows, arguments.vocab_size, generator).to(device)
        exact = exact_sums(rows, ids, arguments.vocab_size)
        for name, way in ways().items():
            for mode in ("on", "off"):
                what = {"ids": kind, "way": name, "deterministic": mode}
                with results.attempt(", ".join(what.values())):
                    measure(way, rows, ids, exact, what=what, results=results)
    raise SystemExit(1 if results.failures else 0)


def ways() -> dict[str, Way]:
    """In float32 where it is not said otherwise; the last is the one in use."""
    return {
        "index_put_ accumulate": _index_put,
        "embedding_dense_backward": _dense_backward,
        "embedding_dense_backward bf16": _dense_backward_as,
        "sum_rows of the model": sum_rows,
    }


def draw_ids(kind: str, count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 below vocab_size; how frequent an id is has nothing to do with how large it is."""
    if kind == "uniform":
        return torch.randint(0, vocab_size, (count,), generator=generator)
    shares = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
    return torch.randperm(vocab_size, generator=generator)[drawn]


def exact_sums(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """In float64, on the CPU."""
    sums = torch.zeros(num_rows, rows.shape[1], dtype=torch.float64)
    return sums.index_add_(0, ids.cpu(), rows.cpu().double())


def measure(way: Way, rows: Tensor, ids: Tensor, exact: Tensor, *, what: dict[str, str], results: Results) -> None:
    """Prints and writes one line of the table, ``what`` in front."""
    num_rows, device = exact.shape[0], rows.device
    with deterministic(device, enabled=what["deterministic"] == "on"):
        runs = [way(rows, ids, num_rows) for _ in range(RUNS)]
        milliseconds = 1000 * median_seconds(lambda: way(rows, ids, num_rows), device)
    error = ((runs[0].double().cpu() - exact).norm() / exact.norm()).item()
    same = all(torch.equal(runs[0], other) for other in runs[1:])
    name = f"{what['ids']}, {what['way']}, {what['deterministic']}"
    print(f"{name:46}{milliseconds:>9.3f}{error:>10.1e}  {'yes' if same else 'NO'}", flush=True)
    results.add("embedding gradient", **what, milliseconds=milliseconds, error=error, same_bits=same)


def _index_put(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    sums = torch.zeros(num_rows, rows.shape[1], dtype=torch.float32, device=rows.device)
    return sums.index_put_((ids,), rows.float(), accumulate=True).to(rows.dtype)


def _dense_backward(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return _dense_backward_as(rows.float(), ids, num_rows).to(rows.dtype)


def _dense_backward_as(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, ids, num_rows, -1, False)  # (rows, no padding id, no scaling)


if __name__ == "__main__":
    main()
