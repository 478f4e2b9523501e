"""How long training stands still for a checkpoint of the 124M recipe, beside the bare copy (floor) and torch's own.

    python benchmarks/checkpoint.py [--device cuda] [--ranks 4] [--step_seconds 0.25] [--repeats 5] [--folder DIR]

Floor first: a rank cannot let training go on before its weights and both moments are copied, bytes / bandwidth: one
copy of as many bytes in one piece into memory that is there already (beside a GPU: pinned memory). --ranks 4 takes a
rank's quarter of the rows, and writes and hashes that part alone. The ways take turns; a figure is the median of the
repeats, behind it the lowest and the highest. dcp is torch.distributed.checkpoint with Hugging Face's format; its stall
is all of save(), or what async_save takes to come back. A gap: in the background a thread may keep the interpreter to
itself, and training then cannot launch anything. Everything before the first save of a run, such as getting
memory, is done before the first repeat. Needs torch, numpy and safetensors alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.bpe_report import Row, Section, Spread, machine, quotients
from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.distributed.process_group import ProcessGroup

RECIPE = ModelConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048)
LIMIT = 0.05
"""Largest share of one step's time that a checkpoint may keep training waiting."""


class Seconds(NamedTuple):
    """Of one save."""

    stall: float
    """Until training may go on."""
    background: float = 0.0
    """From then on until the checkpoint is complete."""
    gap: float = 0.0
    """The longest time meanwhile in which the training thread, though it waits for nothing, does not run."""


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    state = make_state(arguments.ranks, device)
    megabytes = sum(value.nbytes for value in state.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(state, Path(folder), arguments.repeats)
    section = report(found, megabytes, arguments.ranks, arguments.step_seconds)
    for name, value in machine().items():
        show(f"{name}: {value}")
    if device.type == "cuda":
        show(torch.cuda.get_device_name(device))
    show(str(section))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="a rank's part of the state, where there are so many")
    parser.add_argument("--step_seconds", type=float, help="of one optimizer step, for the share of it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write; not given: the system's folder for temporary files"
    )
    return parser.parse_args()


def make_state(ranks: int, device: torch.device) -> dict[str, Tensor]:
    """Weights and two moments, float32; the rows of the first of ``ranks``."""
    with torch.device("meta"):
        model = Transformer(RECIPE)
    state = {}
    for name, parameter in model.named_parameters():
        rows = parameter.chunk(ranks)[0].shape
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            state[f"{kind}.{name}"] = torch.randn(rows, device=device)
    return state


def measure(state: dict[str, Tensor], folder: Path, repeats: int) -> dict[str, list[Seconds]]:
    """The ways take turns."""
    device = next(iter(state.values())).device
    writer = CheckpointWriter(
        folder / "ours", ProcessGroup(rank=0, world_size=1, device=device), tokenizer_json="{}", keep=1
    )
    ways: dict[str, Callable[[int], Seconds]] = {
        "one copy in one piece (floor)": _floor(state),
        "a clone of every tensor": lambda _: _clone(state),
        "ours": lambda step: _ours(writer, state, step),
        "dcp.async_save": lambda step: _dcp_async(state, folder / f"async-{step}"),
        "dcp.save": lambda step: _dcp(state, folder / f"sync-{step}"),
    }
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            gc.collect()
            seconds = way(repeat)
            if repeat:  # the first gets memory and warms up
                found[name].append(seconds)
            for leftover in folder.glob("*sync-*"):
                shutil.rmtree(leftover)
    return found


def _floor(state: dict[str, Tensor]) -> Callable[[int], Seconds]:
    first = next(iter(state.values()))
    count = sum(value.numel() for value in state.values())
    source = torch.zeros(count, device=first.device)
    target = torch.zeros(count, pin_memory=first.is_cuda)

    def copy(_: int) -> Seconds:
        with _stopwatch(first.device) as seconds:
            target.copy_(source, non_blocking=True)
        return Seconds(seconds[0])

    return copy


def _clone(state: dict[str, Tensor]) -> Seconds:
    with _stopwatch(next(iter(state.values())).device) as seconds:
        copies = [value.to("cpu", copy=True) for value in state.values()]
    del copies
    return Seconds(seconds[0])


def _ours(writer: CheckpointWriter, state: dict[str, Tensor], step: int) -> Seconds:
    with _stopwatch(next(iter(state.values())).device) as stall:
        writer.save(state, _info(step))
    assert writer._pending is not None
    return Seconds(stall[0], *_watch(writer._pending))


def _dcp(state: dict[str, Tensor], folder: Path) -> Seconds:
    storage = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _stopwatch(next(iter(state.values())).device) as seconds:
        dcp.save(dict(state), storage_writer=storage, no_dist=True)
    return Seconds(seconds[0])


def _dcp_async(state: dict[str, Tensor], folder: Path) -> Seconds:
    storage = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _stopwatch(next(iter(state.values())).device) as stall:
        future: Any = dcp.async_save(dict(state), storage_writer=storage, no_dist=True)
    return Seconds(stall[0], *_watch(future))


def _watch(future: Future[Any]) -> tuple[float, float]:
    """Seconds until ``future`` is done, and the longest time in which this thread could not run."""
    start = last = time.perf_counter()
    longest = 0.0
    while not future.done():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    future.result()
    return last - start, longest


@contextlib.contextmanager
def _stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Seconds that the block takes, its work on the device included, into the list."""
    found: list[float] = []
    _synchronize(device)
    start = time.perf_counter()
    yield found
    _synchronize(device)
    found.append(time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        tokens_seen=step,
        first_loss=0.0,
        last_loss=0.0,
        model=RECIPE.to_dict(),
        config={},
        data="",
        manifest_fingerprint="",
        tokenizer_fingerprint="",
        world_size=1,
    )


def report(found: dict[str, list[Seconds]], megabytes: float, ranks: int, step_seconds: float | None) -> Section:
    """Stall and background of every way, beside the floor and the step."""
    floor = [seconds.stall for seconds in found["one copy in one piece (floor)"]]
    rows: list[Row] = []
    for name, seconds in found.items():
        stalls, backgrounds = [each.stall for each in seconds], [each.background for each in seconds]
        row: dict[str, Any] = {"": name, "stall, ms": Spread.of(1000 * stall for stall in stalls)}
        row["of the floor"] = quotients(stalls, floor)
        if any(backgrounds):
            row["background, s"] = Spread.of(backgrounds)
            row["longest gap, ms"] = Spread.of(1000 * each.gap for each in seconds)
        wholes = [each.stall + each.background for each in seconds]
        row["MB/s, all of it"] = Spread.of(megabytes / whole for whole in wholes)
        if step_seconds:
            row["of a step, %"] = Spread.of(100 * stall / step_seconds for stall in stalls)
        rows.append(row)
    caption = f"{megabytes:,.0f} MB of float32, a rank's part of {ranks}"
    section = Section(title="Saving a checkpoint of the recipe", tables=[(caption, rows)])
    section.notes.append(
        "Ours hashes every file and waits for the disk (fsync); dcp waits for the disk and hashes nothing."
    )
    if step_seconds:
        share = Spread.of(each.stall / step_seconds for each in found["ours"]).median
        verdict = "met" if share <= LIMIT else "MISSED"
        section.notes.append(
            f"{verdict}: a save keeps a step of {step_seconds:g} s waiting for {share:.2%} of it; at most {LIMIT:.0%}"
        )
    return section


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
