"""Tokens per second of greedy generation on the CPU against transformers, in the same run: 124M shape, random weights.

Both make the same steps in turns, one token for every text each, so that whatever else the machine does hits both; the
figures are those of each one's fastest and median step. The floor of a step is reading every weight once: bytes of
weights over the measured speed of reading memory. ``python benchmarks/generation.py [--threads N] [--steps N]``.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.config import ModelConfig
from model.decoding import Decoder
from model.transformer import Transformer, init_weights
from pipeline.huggingface import llama_config, llama_name

SHAPE = ModelConfig(vocab_size=50_257, context_length=1024, num_layers=12, num_heads=12, d_model=768, d_ff=2048)
PROMPT_TOKENS = 32


def peer(model: Transformer, dtype: torch.dtype) -> Any:
    """transformers' Llama with the same weights and its fastest attention."""
    from transformers import LlamaConfig

    values = llama_config(model.config, dtype=dtype, eot_id=0)
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**values), attn_implementation="sdpa").to(dtype)
    vocab_size = model.config.vocab_size
    weights = {
        llama_name(name): weight[:vocab_size] if "embedding" in name else weight
        for name, weight in model.state_dict().items()
    }
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def their_stepper(theirs: Any, prompts: Tensor) -> Callable[[], Tensor]:
    """Greedy generation as transformers' generate does it, a token for each call."""
    state: dict[str, Any] = {}

    def step() -> Tensor:
        with torch.no_grad():
            tokens = state.get("tokens", prompts)
            output = theirs(tokens, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
        state["cache"], state["tokens"] = output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)
        return state["tokens"][:, 0]

    return step


def our_stepper(decoder: Decoder, prompts: Tensor) -> Callable[[], Tensor]:
    state: dict[str, Tensor] = {}

    def step() -> Tensor:
        logits = decoder.step(state["tokens"]) if state else decoder.add(prompts.tolist())
        state["tokens"] = logits.argmax(dim=-1)
        return state["tokens"]

    return step


def race(model: Transformer, dtype: torch.dtype, batch: int, steps: int) -> None:
    prompts = torch.randint(0, SHAPE.vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        our_stepper(Decoder(model, dtype=dtype, texts=batch), prompts),
        their_stepper(peer(model, dtype), prompts),
    )
    same = 0
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(steps + 1):
        found = {}
        for name, step in (("ours", ours), ("theirs", theirs))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            found[name] = step()
            if number:  # the first reads the prompt
                seconds[name].append(time.perf_counter() - start)
        same += int(torch.equal(found["ours"], found["theirs"]))
    best = {name: batch / min(values) for name, values in seconds.items()}
    middle = {name: batch / statistics.median(values) for name, values in seconds.items()}
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    floor = batch / (num_bytes / reading_speed())
    print(
        f"{str(dtype).removeprefix('torch.'):>8}  batch {batch:>2}  ours {best['ours']:7.1f} tokens/s (median "
        f"{middle['ours']:7.1f})  transformers {best['theirs']:7.1f} ({middle['theirs']:7.1f})  ratio "
        f"{best['ours'] / best['theirs']:.2f} ({middle['ours'] / middle['theirs']:.2f})  floor {floor:7.1f}"
        f"  same tokens in {same} of {steps + 1} steps",
        flush=True,
    )


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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.__version__}, {options.threads} threads, reading {reading_speed() / 1e9:.1f} GB/s")
    model = Transformer(SHAPE)
    init_weights(model, 0)
    for name in options.dtypes:
        for batch in options.batches:
            race(model, getattr(torch, name), batch, options.steps)


if __name__ == "__main__":
    main()
