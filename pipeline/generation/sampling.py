"""Text from a network and its tokenizer: the samples of a run, and text as it comes.

Bytes of a character may be spread over tokens: TextPieces gives out whole characters only, and never a part of a stop
string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal

import torch

from model.generation import generate
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.tokenizer.bpe import Tokenizer


class TextPieces:
    """Turns the tokens of one text into characters as they come.

    Args:
        stop: the text ends before the first of these strings; what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False
        """Whether a stop string came; nothing more comes out then."""

    def add(self, token: int) -> str:
        """What can be shown now that it could not before; may be empty."""
        return self._show(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What was held back; bytes of an unfinished character become U+FFFD."""
        shown = self._show(self._decoder.decode(b"", final=True))
        if self.is_stopped:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _show(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def encode_prompt(tokenizer: Tokenizer, prompt: str, most_tokens: int) -> list[int]:
    """Ids of a prompt; an empty one begins a document. UserError where it is longer than ``most_tokens``."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if len(ids) > most_tokens:
        raise UserError(f"the prompt has {len(ids):,} tokens, the model sees {most_tokens:,}; shorten it")
    return ids


def decoder_dtype(name: Literal["auto", "float32", "bf16"], device: torch.device) -> torch.dtype:
    """The type of matrix products; auto is bf16 on a GPU, float32 on a CPU."""
    if name == "bf16" or (name == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int | None = None, top_p: float | None = 0.9,
) -> str:  # fmt: skip
    """``prompt`` and what the model adds to it, up to <|endoftext|>. Same seed, same text, on every rank.

    For models in training, sharded or not: every rank calls. An empty prompt begins a document. A prompt longer than
    the context is an error.
    """
    ids = encode_prompt(tokenizer, prompt, model.config.context_length)
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
