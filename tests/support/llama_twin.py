"""The independent reference of these tests: transformers' Llama or Qwen3 with the weights of our Transformer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.config import ModelConfig
from model.transformer import Transformer, init_weights

ROUNDING = 1e-5
"""Largest difference over largest value for two float32 computations of the same network.

One rounding is 6e-8 of a value; a number here is the end of some hundreds of roundings in another order (sums of up to
176 terms, 3 layers), which add up like a random walk to about 1e-6; ten times that covers unlucky seeds. A wrong
formula misses by 1e-2 or more.
"""

RENAMED = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attention_norm.": "input_layernorm.",
    "attention.": "self_attn.",
    "feed_forward_norm.": "post_attention_layernorm.",
    "feed_forward.": "mlp.",
    "norm.": "model.norm.",
    "output.": "lm_head.",
}


def small_config(**changes: object) -> ModelConfig:
    """Three layers, four heads, a vocabulary that is no multiple of 64."""
    settings: dict[str, object] = {
        "vocab_size": 203,
        "context_length": 48,
        "num_layers": 3,
        "num_heads": 4,
        "d_model": 64,
        "d_ff": 176,
    }
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


def lively_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose layers all matter: weights five times the usual, norm weights spread around one."""
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(5)
    return model


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)


def llama_name(name: str) -> str:
    """blocks.0.attention.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    parts = name.split(".")
    top = RENAMED[parts[0] + "."]
    if parts[0] != "blocks":
        return top + ".".join(parts[1:])
    return f"{top}{parts[1]}.{RENAMED[parts[2] + '.']}{'.'.join(parts[3:])}"


def llama_twin(model: Transformer) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """A LlamaForCausalLM with plain (eager) attention and copies of the model's weights, padding rows cut off.

    With qk_norm a Qwen3ForCausalLM.
    """
    config = model.config
    kinds = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    twin_class, config_class = kinds
    twin = twin_class._from_config(
        config_class(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            hidden_size=config.d_model,
            head_dim=config.head_dim,
            intermediate_size=config.d_ff,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        ),
        attn_implementation="eager",
    )
    weights = {llama_name(name): real_rows(config, name, weight) for name, weight in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict({name: w.clone() for name, w in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    twin.tie_weights()
    return twin.eval()


def real_rows(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """The tensor without the rows of padding ids."""
    return tensor[: config.vocab_size] if name in ("embedding.weight", "output.weight") else tensor


def grad_of(parameter: Tensor) -> Tensor:
    """The parameter's gradient, which must be there."""
    assert parameter.grad is not None
    return parameter.grad


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
