"""config.json of a model folder that others wrote: the shape of its network, or why it is not one of ours.

Three kinds are read, by their model_type: llama, qwen3 (Llama's network with norms of queries and keys) and gpt2.5, the
published GPT-2.5, whose settings have names of their own beside Llama's. What would make another network of it is
refused by name; so is a value of the wrong kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from pipeline.errors import UserError

GPT25 = "gpt2.5"

_NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_REASONS = {
    "hidden_act": "other activation",
    "num_key_value_heads": "heads that share keys and values",
    "head_dim": "heads of another width than d_model / num_heads",
    "attention_bias": "biases",
    "mlp_bias": "biases",
    "rope_type": "scaled positions",
    "partial_rotary_factor": "heads that are turned in part",
    "sliding_window": "window of attention",
    "layer_types": "window of attention",
    "quantization_config": "quantized weights",
}


@dataclass(frozen=True, kw_only=True)
class _Kind:
    title: str
    more_names: dict[str, str] = field(default_factory=dict)
    """Field of ModelConfig -> a second name of it."""
    defaults: dict[str, Any]
    """Fields that need not be given."""
    network: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that the model_type itself decides."""
    silent: dict[str, Any] = field(default_factory=dict)
    """What transformers takes for further settings that are not given, where this is not our network."""


_KINDS = {
    "llama": _Kind(title="Llama", defaults={"theta": 10_000.0, "tie_embeddings": False}),
    "qwen3": _Kind(
        title="Qwen3",
        defaults={"theta": 10_000.0, "tie_embeddings": False},
        network={"qk_norm": True},
        silent={"head_dim": 128, "num_key_value_heads": 32, "use_sliding_window": False},
    ),
    GPT25: _Kind(
        title="GPT-2.5",
        more_names={name: name for name in ("context_length", "num_layers", "num_heads", "d_model", "d_ff", "theta")},
        defaults={"norm_eps": 1e-5, "tie_embeddings": True},
    ),
}


def read_model_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The shape of the network that the content of a config.json describes; ``path`` is for messages.

    Raises:
        UserError: it is another network than ours, or a setting is missing, contradicts another or is no number.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in _KINDS:
        raise UserError(f"{path} has model_type {name!r}, but this project reads {', '.join(_KINDS)} only")
    kind, rope = _KINDS[name], _rope(path, values)
    settings = {each: _setting(path, values, rope, kind, each) for each in _NAMES}
    try:
        if not isinstance(settings["tie_embeddings"], bool):
            raise ValueError(f"tie_word_embeddings is {settings['tie_embeddings']!r}; it must be true or false")
        numbers = {each: float(settings[each]) for each in ("theta", "norm_eps")}
        config = ModelConfig(**(settings | numbers | kind.network))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a network of ours: {error}") from error
    _refuse_other_networks(path, kind.silent | values, rope, config, kind.title)
    return config


def _rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What is said of the positions: rope_parameters of transformers 5, or rope_scaling before."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rope_parameters {rope!r}, which is no JSON object; mend the file")
    return rope


def _setting(path: Path, values: dict[str, Any], rope: dict[str, Any], kind: _Kind, name: str) -> Any:
    names = [each for each in (kind.more_names.get(name), _NAMES[name]) if each]
    given = {each: values[each] for each in names if values.get(each) is not None}
    if name == "theta" and rope.get("rope_theta") is not None:
        given["rope_theta of rope_parameters"] = rope["rope_theta"]
    if not given and name not in kind.defaults:
        raise UserError(f"{path} has no {' or '.join(names)}; give the folder of a {kind.title} network")
    first = next(iter(given.values()), kind.defaults.get(name))
    if len(given) > 1 and any(value != first for value in given.values()):
        shown = " and ".join(f"{each} {value!r}" for each, value in given.items())
        raise UserError(f"{path} says {shown}, which contradict each other; mend the file")
    return first


def _refuse_other_networks(
    path: Path, values: dict[str, Any], rope: dict[str, Any], config: ModelConfig, title: str
) -> None:
    """Raise a UserError for settings under which transformers would compute another network than ours."""
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    expected: dict[str, tuple[Any, Any]] = {
        "hidden_act": (values.get("hidden_act") or "silu", "silu"),
        "num_key_value_heads": (values.get("num_key_value_heads") or config.num_heads, config.num_heads),
        "head_dim": (values.get("head_dim") or config.head_dim, config.head_dim),
        "attention_bias": (values.get("attention_bias") or False, False),
        "mlp_bias": (values.get("mlp_bias") or False, False),
        "rope_type": (rope.get("rope_type") or rope.get("type") or "default", "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0, 1.0),
        "sliding_window": (window, None),
        "quantization_config": (values.get("quantization_config"), None),
    }
    layers = values.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        expected["layer_types"] = (layers, "full_attention")
    for name, (found, needed) in expected.items():
        if found != needed:
            raise UserError(
                f"{path} has {name} {found!r}, but this network is {title} with {name} {needed!r} only: it has no "
                f"{_REASONS[name]}"
            )
