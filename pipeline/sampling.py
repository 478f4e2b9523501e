"""Text from a network and its tokenizer: the samples of a run, and jobs/generate.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from model.generation import generate
from model.transformer import Transformer
from pipeline.bpe import Tokenizer
from pipeline.checkpoint import TOKENIZER_FILE, find_checkpoint, load_weights, read_info
from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.parallel import join_workers


def generate_texts(config: GenerateConfig, path: Path) -> Iterator[str]:
    """Prompt and continuation, ``num_samples`` times, from the checkpoint (or the run's newest) at ``path``."""
    checkpoint = find_checkpoint(path)
    workers = join_workers(config.device)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)
    model = Transformer(read_info(checkpoint).model_config).to(workers.device)
    load_weights(checkpoint, model)
    for number in range(config.num_samples):
        yield continue_text(
            model,
            tokenizer,
            config.prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed + number,
        )


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int | None = None, top_p: float | None = 0.9,
) -> str:  # fmt: skip
    """``prompt`` and what the model adds to it, up to <|endoftext|>. Same seed, same text, on every rank.

    An empty prompt begins a document. A prompt longer than the context is an error.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if len(ids) > model.config.context_length:
        raise UserError(f"the prompt has {len(ids)} tokens, the model sees {model.config.context_length}; shorten it")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    new = generate(
        model,
        torch.tensor([ids], device=device),  # (1, T)
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_id=tokenizer.eot_id,
    )
    model.train(training)
    return prompt + tokenizer.decode(new[0])
