"""A process of test_step.py: ``step_process.py FOLDER OPTIMIZER...`` makes steps on sharded weights.

Every rank takes its rows of the batch, in two micro-batches; rank 0 writes the weights that come out of each optimizer.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import loss, muon
from model.muon import Group, Muon, muon_groups
from model.optimizer import AdamW, clip_by_norm, local_squared_norm, parameter_groups
from model.transformer import Transformer
from pipeline.distributed.fsdp import local_part, parallelize, set_gradient_sync
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.training.optimizer import all_to_all
from tests.support.llama_twin import lively_model, random_tokens, small_config

EXACT = muon.orthogonalize
STEPS, WINDOWS, LENGTH = 4, 12, 48


def train(workers: ProcessGroup, name: str, num_micro_batches: int = 2) -> Transformer:
    """STEPS steps over WINDOWS windows shared by the workers."""
    loss.CHUNK_BYTES["cpu"] = 256 * 4 * 40  # 40 rows of logits: several chunks a micro-batch
    model = lively_model(small_config())
    parallelize(model, workers, dtype=torch.float32, compile_blocks=False)
    optimizer = make_optimizer(model, name, workers)
    share = WINDOWS // workers.world_size
    for step in range(STEPS):
        tokens = random_tokens(model.config, batch=WINDOWS, length=LENGTH + 1, seed=step)
        mine = tokens[workers.rank * share : (workers.rank + 1) * share]
        for index, batch in enumerate(mine.chunk(num_micro_batches)):
            set_gradient_sync(model, enabled=index == num_micro_batches - 1)
            (model(batch[:, :-1], batch[:, 1:]) * (len(batch) / share)).backward()
        grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
        clip_by_norm(grads, workers.sum(local_squared_norm(grads)).sqrt(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # an evaluation in between must not leave old weights behind
            with torch.no_grad():
                model(tokens[:1, :-1], tokens[:1, 1:])
    return model


def make_optimizer(model: Transformer, name: str, workers: ProcessGroup) -> AdamW:
    if name == "adamw":
        return AdamW(parameter_groups(model, 0.1), lr=1e-2, local_part=local_part)
    # Float64, or the rounding of bfloat16 would hide small mistakes.
    muon.orthogonalize = functools.partial(EXACT, dtype=torch.float64)
    group = Group(rank=workers.rank, size=workers.world_size, all_to_all=all_to_all)
    return Muon(muon_groups(model, model.blocks, 0.1), lr=1e-2, local_part=local_part, group=group)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    torch.set_num_threads(1)
    workers = init_distributed("cpu")
    for name in sys.argv[2:]:
        model = train(workers, name)
        weights = {key: whole(parameter.detach()).contiguous() for key, parameter in model.named_parameters()}
        if workers.is_rank_zero:
            save_file(weights, f"{sys.argv[1]}/{name}.safetensors")
    workers.broadcast_int(0)
    os._exit(0)


if __name__ == "__main__":
    main()
