"""The published GPT-2.5 by another hand: its tensors under its own names, its forward pass, its folder.

Written from the description of that network, sharing no line with ours: rotary positions are complex numbers, a
neighbouring pair (2i, 2i + 1) each; attention, norm and SwiGLU are their formulas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
TRAP = "raise SystemExit('the code of a model folder was run')\n"


@dataclass(frozen=True, kw_only=True)
class PublishedNetwork:
    """Shape and weights; random ones, of which every layer matters."""

    vocab_size: int
    context_length: int = 128
    num_layers: int = 2
    num_heads: int = 2
    d_model: int = 32
    d_ff: int = 64
    theta: float = 10_000.0
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for name, shape in self._shapes().items():
            noise = torch.randn(shape, generator=generator)
            self.weights[name] = 1 + 0.3 * noise if len(shape) == 1 else 0.1 * noise

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        width, hidden = self.d_model, self.d_ff
        shapes: dict[str, tuple[int, ...]] = {"emb.weight": (self.vocab_size, width), "norm.weight": (width,)}
        for number in range(self.num_layers):
            block = f"tblocks.{number}"
            shapes |= {f"{block}.norm_att.weight": (width,), f"{block}.norm_ff.weight": (width,)}
            shapes |= {f"{block}.mhsa.{name}.weight": (width, width) for name in ("Wq", "Wk", "Wv", "Wo")}
            shapes |= {f"{block}.ffn.w1": (hidden, width), f"{block}.ffn.w3": (hidden, width)}
            shapes[f"{block}.ffn.w2"] = (width, hidden)
        return shapes

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        weights = {name: weight.float() for name, weight in self.weights.items()}
        x = weights["emb.weight"][tokens]
        for number in range(self.num_layers):
            block = f"tblocks.{number}"
            normed = self._norm(x, weights[f"{block}.norm_att.weight"])
            q, k, v = (normed @ weights[f"{block}.mhsa.{name}.weight"].T for name in ("Wq", "Wk", "Wv"))
            x = x + self._attention(q, k, v) @ weights[f"{block}.mhsa.Wo.weight"].T
            normed = self._norm(x, weights[f"{block}.norm_ff.weight"])
            gate, up = normed @ weights[f"{block}.ffn.w1"].T, normed @ weights[f"{block}.ffn.w3"].T
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{block}.ffn.w2"].T
        return self._norm(x, weights["norm.weight"]) @ weights["emb.weight"].T

    @staticmethod
    def _norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-5) * gain

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, width = q.shape
        head = width // self.num_heads
        q, k, v = (x.reshape(batch, length, self.num_heads, head).transpose(1, 2) for x in (q, k, v))
        scores = self._turned(q) @ self._turned(k).transpose(-2, -1) / math.sqrt(head)
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())  # (B, H, T, K/2)
        angles = self._angles(x.shape[-2], x.shape[-1])
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape)

    def _angles(self, length: int, head: int) -> Tensor:
        frequencies = self.theta ** (-2 * torch.arange(head // 2) / head)
        return torch.arange(length)[:, None] * frequencies

    def tensors(
        self, *, prefix: str = "model.", tables: bool = True, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """What the published code saves: the weights and, with ``tables``, the cosines and sines of the positions."""
        found = dict(self.weights)
        if tables:
            angles = self._angles(self.context_length, self.d_model // self.num_heads)
            for number in range(self.num_layers):
                rope = f"tblocks.{number}.mhsa.rope"
                found |= {f"{rope}.cos": angles.cos(), f"{rope}.sin": angles.sin()}
        return {prefix + name: tensor.to(dtype).contiguous() for name, tensor in found.items()}

    def config(self) -> dict[str, Any]:
        """config.json as transformers writes it for the published configuration class."""
        own = {name: getattr(self, name) for name in ("context_length", "num_layers", "num_heads", "d_model", "d_ff")}
        return {
            "architectures": ["GPT25ForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_gpt25.GPT25ForCausalLM"},
            "model_type": "gpt2.5",
            "vocab_size": self.vocab_size,
            **own,
            "max_position_embeddings": self.context_length,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "head_dim": self.d_model // self.num_heads,
            "theta": self.theta,
            "device": None,
            "dtype": "float32",
            "tie_word_embeddings": True,
        }

    def save(self, folder: Path, tensors: dict[str, Tensor] | None = None, *, files: int = 1, **config: Any) -> Path:
        """Write a folder with code that must not be run; ``files`` of them and an index, where it is more than one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config() | config))
        (folder / "modeling_gpt25.py").write_text(TRAP)
        save_tensors(folder, tensors or self.tensors(), files=files)
        return folder


def save_tensors(folder: Path, tensors: dict[str, Tensor], *, files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    names: Sequence[str] = sorted(tensors)
    for number in range(files):
        part, file = names[number::files], f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def chat_tokenizer(source: Path, folder: Path) -> Path:
    """The tokenizer.json ``source`` with three more special tokens, as `tokenizers` writes it; returns its path."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
