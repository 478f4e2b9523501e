"""Folders that transformers wrote for networks that fit ours: the same logits; and those that do not, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.pretrained import weights
from tests.support.llama_twin import ROUNDING, relative_error

SHAPE: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def a_llama(**changes: Any) -> Any:
    """Random weights, of which every layer matters."""
    torch.manual_seed(2)
    model: Any = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE | changes), attn_implementation="eager")
    return lively(model)


def a_qwen(**changes: Any) -> Any:
    torch.manual_seed(2)
    config = Qwen3Config(**SHAPE | {"head_dim": 12} | changes)
    model: Any = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    return lively(model)


@torch.no_grad()
def lively(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 5 * parameter)
    return model.eval()


def assert_same_logits(theirs: Any, folder: Path) -> None:
    ours = Transformer(weights.read_model_config(folder))
    weights.load_weights(folder, ours)
    tokens = torch.arange(80).reshape(2, 40) * 2
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs.eval()(tokens).logits) < ROUNDING


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1},
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7, "intermediate_size": 61},
        {"vocab_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 4096},
    ],
)
def test_llamas_of_any_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = a_llama(**changes)
    model.save_pretrained(tmp_path)
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "use_sliding_window": False},
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 8},
    ],
)
def test_qwens_of_any_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = a_qwen(**changes)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert weights.read_model_config(tmp_path).qk_norm
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_key_value_heads": 2},
            "num_key_value_heads 2, but this network is Qwen3 with num_key_value_heads 4 only",
        ),
        ({"head_dim": 128}, "head_dim 128, .*: it has no heads of another width"),
        ({"attention_bias": True}, "attention_bias True, .*: it has no biases"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window 8, .*: it has no window of attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "it has no window of attention"),
        ({"model_type": "llama"}, r"self_attn\.k_norm\.weight, which is not ours"),
    ],
)
def test_qwens_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    a_qwen().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=words):
        weights.read_model_config(tmp_path)


def test_what_qwen3_is_silent_about_is_what_transformers_takes(tmp_path: Path) -> None:
    a_qwen().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name, words in (("head_dim", "head_dim 128"), ("num_key_value_heads", "num_key_value_heads 32")):
        left = {each: value for each, value in values.items() if each != name}
        (tmp_path / "config.json").write_text(json.dumps(left))
        with pytest.raises(UserError, match=words):
            weights.read_model_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_files_and_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = a_llama().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    # Read again, since .to() has rounded the frequencies of its positions too, which no file holds.
    assert_same_logits(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tmp_path)


def test_settings_as_transformers_4_wrote_them(tmp_path: Path) -> None:
    model = a_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"], values["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": 500.0, "rope_scaling": None}))
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads 2, .*: it has no heads that share keys and values"),
        ({"head_dim": 16}, "head_dim 16, .*: it has no heads of another width"),
        ({"attention_bias": True}, "attention_bias True, .*: it has no biases"),
        ({"mlp_bias": True}, "mlp_bias True, .*: it has no biases"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2', .*: it has no other activation"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3', .* no scaled positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5, .* turned in part"),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0}, "7.0, which contradict each other"),
        ({"rope_theta": 0, "rope_parameters": None}, "theta is 0.0; it must be positive"),
        ({"sliding_window": 1024}, "sliding_window 1024, .*: it has no window of attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \['full_attention', 'slid"),
        ({"layer_types": 5}, "layer_types 5"),
        ({"quantization_config": {"bits": 4}}, "it has no quantized weights"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], but this project reads"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"hidden_size": True}, "d_model is True; it must be a positive whole number"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps; give the folder of a Llama network"),
        ({"num_hidden_layers": 2}, "has the tensor model.layers.2"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
        ({"vocab_size": 204}, r"embed_tokens.weight of shape \(203, 48\), but its config.json asks for \(204, 48\)"),
        ({"num_hidden_layers": 10**9}, "num_layers 1,000,000,000, for which the weights beside it are far too small"),
        ({"intermediate_size": 10**15}, "d_ff 1,000,000,000,000,000, for which the weights beside it are far"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_reason(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    a_llama().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=words) as caught:
        weights.read_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_adapters_and_biases_in_the_files_are_refused_by_name(tmp_path: Path) -> None:
    model = a_llama(attention_bias=True)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"attention_bias": true', '"attention_bias": false'))
    with pytest.raises(UserError, match=r"has the tensor model\.layers\.0\.self_attn\.k_proj\.bias, which is not ours"):
        weights.read_model_config(tmp_path)
