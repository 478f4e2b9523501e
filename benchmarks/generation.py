"""Greedy text on the CPU, tokens per second against transformers' generate in the same run: 124M shape, random weights.

The same prompts and the same number of new tokens, whole calls in turns, so that whatever else the machine does hits
both: ours is a Batch, as jobs/generate.py, the server and the MLflow model run it; theirs is ``generate``, and, to tell
the network from the loop around it, their forward pass called by hand. Reading the prompts counts. The floor is reading
every weight once a token. ``python benchmarks/generation.py [--threads N] [--repeats N] [--tokens N]``.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.batching import Batch, Request
from model.config import ModelConfig
from model.decoding import Decoder
from model.transformer import Transformer, init_weights
from pipeline.pretrained.huggingface import config_values, llama_name

SHAPE = ModelConfig(vocab_size=50_257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048)
PROMPT_TOKENS = 32


def peer(model: Transformer, dtype: torch.dtype) -> Any:
    """transformers' Llama with the same weights and its fastest attention; no token ends a text."""
    values = config_values(model.config, dtype=dtype, eot_id=0)
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**values), attn_implementation="sdpa").to(dtype)
    vocab_size = model.config.vocab_size
    weights = {
        llama_name(name): weight[:vocab_size] if "embedding" in name else weight
        for name, weight in model.state_dict().items()
    }
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def by_generate(theirs: Any, prompts: Tensor, num_tokens: int) -> Tensor:
    mask = torch.ones_like(prompts)
    found = theirs.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    new: Tensor = found[:, prompts.shape[1] :]
    return new


@torch.no_grad()
def by_hand(theirs: Any, prompts: Tensor, num_tokens: int) -> Tensor:
    found, cache = [prompts], None
    for _ in range(num_tokens):
        output = theirs(found[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        found.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
    return torch.cat(found[1:], dim=1)


def by_ours(decoder: Decoder, prompts: Tensor, num_tokens: int) -> Tensor:
    batch = Batch(decoder, max_texts=len(prompts))
    for number, prompt in enumerate(prompts.tolist()):
        batch.add(number, Request(tokens=prompt, max_new_tokens=num_tokens, temperature=0.0))
    found: list[list[int]] = [[] for _ in prompts]
    while len(batch):
        for step in batch.step():
            if step.token is not None:
                found[int(str(step.key))].append(step.token)
    return torch.tensor(found)


def race(model: Transformer, dtype: torch.dtype, texts: int, num_tokens: int, repeats: int) -> None:
    prompts = torch.randint(0, SHAPE.vocab_size, (texts, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    decoder, theirs = Decoder(model, dtype=dtype, texts=texts), peer(model, dtype)
    runners = {"ours": (by_ours, decoder), "generate": (by_generate, theirs), "by hand": (by_hand, theirs)}
    rates: dict[str, list[float]] = {name: [] for name in runners}
    found: dict[str, Tensor] = {}
    for number in range(repeats + 1):
        for name, (run, one) in list(runners.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            found[name] = run(one, prompts, num_tokens)
            if number:  # the first warms up
                rates[name].append(found[name].numel() / (time.perf_counter() - start))
    print(f"{str(dtype).removeprefix('torch.')}, {texts} texts, {floor(model, dtype, texts):.0f} tokens/s at most:")
    for name, values in rates.items():
        ratios = [ours / each for ours, each in zip(rates["ours"], values, strict=True)]
        same = (found["ours"] == found[name]).float().mean().item()
        print(
            f"  {name:<9}{statistics.median(values):7.1f} tokens/s ({min(values):.1f} to {max(values):.1f})  ours / it "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  same tokens {same:.2%}",
            flush=True,
        )


def floor(model: Transformer, dtype: torch.dtype, texts: int) -> float:
    """Tokens per second when a step takes as long as reading all weights once."""
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return texts * reading_speed() / num_bytes


def reading_speed(num_bytes: int = 500_000_000) -> float:
    """Bytes per second of summing a large float32 tensor, the fastest of several."""
    values = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.__version__}, {options.threads} threads, reading {reading_speed() / 1e9:.1f} GB/s")
    model = Transformer(SHAPE)
    init_weights(model, 0)
    for name in options.dtypes:
        for batch in options.batches:
            race(model, getattr(torch, name), batch, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
