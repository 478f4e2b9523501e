"""Tokens per second of greedy generation on the CPU against transformers, in the same run: 124M shape, random weights.

Both go on with the same texts in turns, some tokens each, so that whatever else the machine does hits both; a figure is
the median over the turns. The floor of a token without drafts is reading every weight once: bytes of weights over the
measured speed of reading memory. What drafts give depends on how often they are right, which is printed. The random
weights are large enough for the logits to depend on the whole text (``--spread``): no token stands out as in the text
of a trained network, and a guess is wrong more often. ``python benchmarks/generation.py [--threads N] [--turns N]``.
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

from model.batching import Batch, Request
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


class Ours:
    """Greedy texts in a Batch, as jobs/generate.py makes them."""

    def __init__(self, decoder: Decoder, prompts: Tensor) -> None:
        self.batch = Batch(decoder, max_texts=len(prompts))
        for row, prompt in enumerate(prompts.tolist()):
            self.batch.add(
                row, Request(tokens=prompt, max_new_tokens=SHAPE.context_length - len(prompt), temperature=0)
            )
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.num_calls = 0

    def go_on(self, num_tokens: int) -> int:
        """Until every text has so many more; returns how many all have got."""
        before = [len(text) for text in self.texts]
        while any(len(text) < start + num_tokens for text, start in zip(self.texts, before, strict=True)):
            self.num_calls += 1
            for step in self.batch.step():
                row: Any = step.key
                assert step.token is not None
                self.texts[row].append(step.token)
        return sum(map(len, self.texts)) - sum(before)


def race(model: Transformer, dtype: torch.dtype, batch: int, turns: int, tokens: int) -> None:
    prompts = torch.randint(0, SHAPE.vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    ours, step = Ours(Decoder(model, dtype=dtype), prompts), their_stepper(peer(model, dtype), prompts)
    ours.go_on(1)
    theirs = [step()]  # the first reads the prompt
    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(turns):
        start = time.perf_counter()
        count = ours.go_on(tokens)
        speeds["ours"].append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        theirs += [step() for _ in range(tokens)]
        speeds["theirs"].append(batch * tokens / (time.perf_counter() - start))
    rows = torch.stack(theirs, dim=1).tolist()
    same = sum(
        ours_row[: turns * tokens] == row[: turns * tokens] for ours_row, row in zip(ours.texts, rows, strict=True)
    )
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = sorted(our / their for our, their in zip(speeds["ours"], speeds["theirs"], strict=True))
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    a_step = sum(map(len, ours.texts)) / batch / ours.num_calls
    print(
        f"{str(dtype).removeprefix('torch.'):>8}  batch {batch:>2}  ours {middle['ours']:7.1f} tokens/s  transformers "
        f"{middle['theirs']:7.1f}  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})  floor "
        f"without drafts {batch * reading_speed() / num_bytes:7.1f}  {a_step:.2f} tokens a step and text  "
        f"{same} of {batch} texts equal over {turns * tokens} tokens",
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
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="of each text in a turn")
    parser.add_argument("--spread", type=float, default=3.0, help="factor on the usual random weights")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.__version__}, {options.threads} threads, reading {reading_speed() / 1e9:.1f} GB/s")
    model = Transformer(SHAPE)
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(options.spread)
    for name in options.dtypes:
        for batch in options.batches:
            race(model, getattr(torch, name), batch, options.turns, options.tokens)


if __name__ == "__main__":
    main()
