"""Two ranks of checkpoints/test_ranks.py: ``checkpoint_process.py FOLDER`` saves, spoils, fails, resumes.

What each rank saw is written to FOLDER/rank-R.json.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.optimizer import AdamW, parameter_groups
from model.transformer import Transformer
from pipeline.checkpoints.reader import list_checkpoints, open_newest, read_tensors
from pipeline.checkpoints.writer import CheckpointWriter, training_state
from pipeline.distributed.fsdp import parallelize
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.errors import UserError
from tests.checkpoints.test_writer import info

MODEL = ModelConfig(vocab_size=300, context_length=16, num_layers=2, num_heads=1, d_model=33 * 2, d_ff=71)
"""Rows that three ranks, and two, cannot share evenly."""


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    checkpoints, workers = folder / "checkpoints", init_distributed("cpu")
    state = sharded_state(workers)
    if workers.is_rank_zero:
        remember = {name: value.full_tensor() for name, value in state.items() if isinstance(value, DTensor)}
        save_file(remember, folder / "whole.safetensors")
    else:
        _ = [value.full_tensor() for value in state.values() if isinstance(value, DTensor)]
    writer = CheckpointWriter(checkpoints, workers, keep=3, tokenizer_json="{}")
    seen: dict[str, Any] = {"saved": saved_twice(writer, state)}
    if workers.is_rank_zero:
        spoil(checkpoints / "step-000002" / "shard-00002-model-00001-of-00001.safetensors")
    workers.broadcast_int(0)
    with open_newest(checkpoints, workers) as found:
        assert found is not None
        seen["resumed"] = [found.info.step, str(found.path)]
        before = {name: local(value).clone() for name, value in state.items()}
        for value in state.values():
            local(value).zero_()
        read_tensors(found.path, state)
        seen["equal"] = all(torch.equal(before[name], local(value)) for name, value in state.items())
    seen["failure"] = sentence_of(lambda: save_while_a_rank_fails(writer, workers, state))
    seen["steps"] = [step for step, _ in list_checkpoints(checkpoints)]
    writer.save(state, info(4))
    writer.wait()
    workers.broadcast_int(0)
    if workers.is_rank_zero:
        for step in (1, 4):
            (checkpoints / f"step-{step:06d}" / "tokenizer.json").write_text("")
    workers.broadcast_int(0)
    seen["nothing left"] = sentence_of(lambda: open_newest(checkpoints, workers).__enter__())
    (folder / f"rank-{workers.rank}.json").write_text(json.dumps(seen))
    workers.broadcast_int(0)


def sharded_state(workers: ProcessGroup) -> dict[str, Tensor]:
    model = Transformer(MODEL)
    parallelize(model, workers, dtype=torch.float32, compile_blocks=False)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    optimizer.init_state()
    state = training_state(model, optimizer)
    for index, value in enumerate(state.values()):
        torch.manual_seed(index * 2 + workers.rank)
        local(value).normal_()
    return state


def saved_twice(writer: CheckpointWriter, state: dict[str, Tensor]) -> list[int]:
    writer.save(state, info(1))
    writer.save(state, info(2))
    writer.wait()
    return [step for step, _ in list_checkpoints(writer.folder)]


def save_while_a_rank_fails(writer: CheckpointWriter, workers: ProcessGroup, state: dict[str, Tensor]) -> None:
    with contextlib.ExitStack() as stack:
        if workers.rank == 1:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            stack.enter_context(mock.patch.object(HuggingFaceStorageWriter, "write_data", side_effect=full))
        writer.save(state, info(3))
        writer.wait()


def sentence_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    with torch.no_grad():
        main()
