"""The optimizer and the learning rate of a run, by its settings; the weights may be sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.muon import Group, Muon, muon_groups
from model.optimizer import AdamW, parameter_groups, warmup_cosine, warmup_linear
from model.transformer import Transformer
from pipeline.distributed.fsdp import local_part
from pipeline.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from pipeline.config.training import PretrainConfig


def build_optimizer(model: Transformer, config: PretrainConfig, workers: ProcessGroup) -> AdamW:
    """AdamW for all parameters; with --optimizer muon, Muon for the matrices of the blocks and AdamW for the rest."""
    settings: dict[str, Any] = {
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "compile": compiles(config, workers),
    }
    if config.optimizer == "adamw":
        groups = parameter_groups(model, config.weight_decay)
        return AdamW(groups, config.lr, **settings, local_part=local_part)
    groups = muon_groups(model, model.blocks, config.weight_decay)
    processes = Group(rank=workers.rank, size=workers.world_size, all_to_all=all_to_all)
    return Muon(groups, config.lr, **settings, local_part=local_part, group=processes)


def learning_rate(config: PretrainConfig, step: int) -> float:
    """The learning rate of ``step``, counted from 0, by --schedule."""
    ends: dict[str, Any] = {
        "max_lr": config.lr,
        "min_lr": config.lr * config.min_lr_fraction,
        "warmup_steps": config.num_warmup_steps,
        "total_steps": config.train_steps,
    }
    if config.schedule == "cosine":
        return warmup_cosine(step, **ends)
    return warmup_linear(step, **ends, decay_from=config.first_decay_step)


def compiles(config: PretrainConfig, workers: ProcessGroup) -> bool:
    """Whether the step is compiled: with --compile on, and by default on a GPU."""
    return config.compile == "on" or (config.compile == "auto" and workers.device.type == "cuda")


def all_to_all(outgoing: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Send flat tensor r to rank r; returns the received tensors, counts[r] numbers from rank r. Collective."""
    received = outgoing[0].new_empty(sum(counts))
    sent = torch.cat(outgoing)
    dist.all_to_all_single(received, sent, counts, [len(tensor) for tensor in outgoing])
    return list(received.split(counts))
