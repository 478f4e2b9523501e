"""What benchmarks/train_step.py times: one optimizer step of our network and of the peers', as plain functions.

Peers are transformers' LlamaForCausalLM, the same architecture and shapes as ours, and GPT2LMHeadModel, which has the
same matrix products per token: a d_ff of 2,048 in three matrices against 3,072 in two. Both take SDPA attention and
torch.optim.AdamW with its defaults; compiled ones take fused=True besides, and are compiled for the one shape they see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.optimizer import AdamW, clip_grad_norm, parameter_groups
from model.transformer import Transformer, init_weights
from pipeline.distributed.determinism import deterministic
from pipeline.distributed.fsdp import local_part, parallelize
from pipeline.distributed.process_group import ProcessGroup

PRESETS = {
    "124M": ModelConfig(vocab_size=50_257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048),
    "tiny": ModelConfig(vocab_size=500, context_length=64, num_layers=2, num_heads=2, d_model=64, d_ff=176),
}
OURS = ("ours", "ours compiled")
PEERS = ("llama", "gpt2", "llama compiled", "gpt2 compiled")
BETAS, WEIGHT_DECAY, LR, CLIP = (0.9, 0.95), 0.1, 6e-4, 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contestants share."""

    config: ModelConfig
    micro_batch: int
    """Windows of one forward pass; a step has one micro-batch."""
    dtype: torch.dtype
    """Of the matrix products; weights and optimizer are float32."""
    workers: ProcessGroup
    deterministic: bool = True
    """Our steps in a form that gives the same bits every time, as the Trainer's are; the peers' are not."""
    fsdp: bool = False
    """Ours is sharded by FSDP2, over the process group that there is."""

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.config.context_length

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.micro_batch, self.config.context_length + 1)
        return torch.randint(0, self.config.vocab_size, shape, generator=generator).to(self.workers.device)


def make_step(name: str, setting: Setting) -> Callable[[], Tensor]:
    """One step of the contestant: forward, backward, clip, update; returns the loss without waiting for it."""
    if name in OURS:
        return our_step(setting, compiled="compiled" in name)
    family = {"llama": llama, "gpt2": gpt2}[name.split(maxsplit=1)[0]]
    return peer_step(family(setting.config), setting, compiled="compiled" in name)


def our_step(setting: Setting, *, compiled: bool) -> Callable[[], Tensor]:
    model = Transformer(setting.config)
    init_weights(model, seed=0)
    parallelize(model, setting.workers, dtype=setting.dtype, compile_blocks=compiled)
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = AdamW(groups, LR, BETAS, compile=compiled, local_part=local_part)
    tokens = setting.tokens()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        with deterministic(setting.workers.device, enabled=setting.deterministic):
            loss = model(inputs, targets)
            loss.backward()
            clip_grad_norm([local_part(p.grad) for p in model.parameters() if p.grad is not None], CLIP)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peer_step(model: Any, setting: Setting, *, compiled: bool) -> Callable[[], Tensor]:
    device = setting.workers.device
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True if compiled else None)
    forward = torch.compile(model, dynamic=False) if compiled else model
    inputs = setting.tokens()[:, :-1].contiguous()
    precision: Any = contextlib.nullcontext()
    if setting.dtype != torch.float32:
        precision = torch.autocast(device.type, setting.dtype)

    def step() -> Tensor:
        with precision:
            loss = forward(input_ids=inputs, labels=inputs).loss  # transformers shifts the labels
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def llama(config: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(settings, attn_implementation="sdpa")


def gpt2(config: ModelConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.d_model,
        n_inner=config.d_ff * 3 // 2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel._from_config(settings, attn_implementation="sdpa")
