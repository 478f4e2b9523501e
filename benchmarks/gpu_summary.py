"""The last lines of benchmarks/gpu.py: what its parts found, short enough for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines about these results (benchmarks/results.py), in their order."""
    yield "== summary"
    for row in rows:
        line = _line(row)
        if line:
            yield f"{row['part']:18}{line}"


def _line(row: dict[str, Any]) -> str:
    line = ""
    match row["result"]:
        case "end":
            line = f"{row['status']}, {row['seconds']:.0f} s"
        case "speed":
            milliseconds = 1000 * sorted(row["step_seconds"])[len(row["step_seconds"]) // 2]
            line = (
                f"{row['name']}, {row['micro_batch']} windows: {row['tokens_per_second']:,.0f} tokens/s, "
                f"{milliseconds:,.1f} ms, MFU {row['mfu']:.1%}, {row['step_memory_gib']:.1f} GiB"
            )
        case "ratio":
            line = f"{row['name']} is {row['times_as_fast']:.2f} times as fast as {row['peer']}"
        case "embedding gradient":
            bits = "same" if row["same_bits"] else "OTHER"
            line = (
                f"{row['ids']}, {row['way']}, deterministic {row['deterministic']}: "
                f"{row['milliseconds']:.2f} ms, {bits} bits"
            )
        case "check" if not row["good"]:
            line = f"FAIL {row['name']}: {row['measured']:.2e}, allowed {row['allowed']:.0e}"
        case "training":
            line = (
                f"val loss {row['val_loss']:.4f} after {row['steps']} steps, {row['tokens_seen']:,} tokens, "
                f"{row['tokens_per_second']:,.0f} tokens/s"
            )
        case "overhead":
            line = f"{sorted(row['overheads'])[len(row['overheads']) // 2]:+.2%} around a bare step"
        case "failure" | "out of memory":
            line = f"{row['result']}: {row.get('what') or row.get('name')} {row.get('error', '')}"[:300]
    return line
