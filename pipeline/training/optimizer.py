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
        groups = _by_kind(parameter_groups(model, config.weight_decay), model, config)
        return AdamW(groups, config.lr, **settings, local_part=local_part)
    settings |= {
        "momentum": config.muon_momentum,
        "coefficients": config.muon_coefficients,
        "iterations": config.muon_iterations,
        "group": Group(rank=workers.rank, size=workers.world_size, all_to_all=all_to_all),
    }
    groups = _by_kind(muon_groups(model, model.blocks, config.weight_decay), model, config)
    return Muon(groups, config.lr, **settings, local_part=local_part)


def _by_kind(groups: list[dict[str, Any]], model: Transformer, config: PretrainConfig) -> list[dict[str, Any]]:
    """The groups, with those of the embedding, of an output matrix and of vectors at rates and decay of their own."""
    decay = config.weight_decay if config.embedding_weight_decay is None else config.embedding_weight_decay
    names = {id(model.embedding.weight): "embedding_lr"}
    if model.output is not None:
        names[id(model.output.weight)] = "output_lr"
    result: list[dict[str, Any]] = []
    for group in groups:
        kinds: dict[str, list[Tensor]] = {"embedding_lr": [], "output_lr": [], "vector_lr": [], "lr": []}
        for parameter in group["params"]:
            kinds[names.get(id(parameter), "lr" if parameter.ndim >= 2 else "vector_lr")].append(parameter)
        for name, params in kinds.items():
            rate = getattr(config, name)
            own: dict[str, Any] = {"weight_decay": decay} if name in {"embedding_lr", "output_lr"} else {}
            ratio = 1.0 if rate is None or name == "lr" else rate / config.lr
            if params:
                result.append({**group, **own, "params": params, "lr_ratio": ratio})
    return result


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
