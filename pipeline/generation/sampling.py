"""Text from a network and its tokenizer: the samples of a run, and token by token.

The bytes of a character may be spread over tokens: a Detokenizer returns whole characters only, and never a part of a
stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import torch

from model.generation import generate
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.tokenizer.bpe import Tokenizer


class Detokenizer:
    """Turns the tokens of one sequence into text, token by token.

    Args:
        stop: the text ends before the first of these strings; what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was found; no more text is returned then."""

    def add(self, token: int) -> str:
        """Add a token and return the text that is complete now; it may be empty."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """Return the text that was held back; bytes of an unfinished character become U+FFFD."""
        released = self._release(self._decoder.decode(b"", final=True))
        if self.is_stopped:
            return released
        held, self._held = self._held, ""
        return released + held

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        stops = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if stops:
            self.is_stopped = True
            return self._held[: min(stops)]
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def encode_prompt(tokenizer: Tokenizer, prompt: str, most_tokens: int) -> list[int]:
    """Ids of a prompt; an empty prompt starts a document. UserError where it is longer than ``most_tokens``."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if len(ids) > most_tokens:
        raise UserError(f"the prompt has {len(ids):,} tokens, the model sees {most_tokens:,}; shorten it")
    return ids


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int | None = None, top_p: float | None = 0.9,
) -> str:  # fmt: skip
    """``prompt`` and its continuation by the model, up to <|endoftext|>; the same on every rank for the same seed.

    For models in training, sharded or not: every rank calls. An empty prompt starts a document. A prompt longer than
    the context is a UserError.
    """
    ids = encode_prompt(tokenizer, prompt, model.config.context_length)
    new = continue_ids(
        model, ids, stop_id=tokenizer.eot_id, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
        top_k=top_k, top_p=top_p,
    )  # fmt: skip
    return prompt + tokenizer.decode(new)


def continue_ids(
    model: Transformer, ids: Sequence[int], *, stop_id: int, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int | None = None, top_p: float | None = 0.9,
) -> list[int]:  # fmt: skip
    """The ids that the model puts behind ``ids``, up to ``stop_id``, which is left out; see continue_text."""
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
        stop_id=stop_id,
    )
    model.train(training)
    return new[0]
