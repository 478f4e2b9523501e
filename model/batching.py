"""Continuous batching: requests of different lengths and settings enter and leave one Decoder while others run.

A request gives the same tokens alone and in a batch, now or later: its random numbers are its own, and the network
computes each sequence by itself (up to float32 rounding, which differs with the number of sequences by about 1e-7 of
a logit). Tokens are read back once a step, for all sequences together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.decoding import Decoder
from model.generation import check_sampling, sample_token

PROMPT_TOKENS_AT_ONCE = 2048
"""Prompt tokens in one forward pass, padding included: sequences that are being decoded wait for it."""

Reason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it; ValueError for settings that sample_token rejects."""

    tokens: Sequence[int]
    """At least one; only the last context_length are used."""
    max_new_tokens: int
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.9
    seed: int = 0
    stop_id: int | None = None
    """The text ends before this token."""

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not self.tokens or self.max_new_tokens < 1:
            raise ValueError(f"{len(self.tokens)} tokens, max_new_tokens {self.max_new_tokens}; both must be positive")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one step for one sequence."""

    key: Hashable
    token: int | None
    """None where the text ended before it."""
    finished: Reason | None
    """stop: at stop_id; length: after max_new_tokens."""


@dataclass(kw_only=True)
class _Text:
    key: Hashable
    request: Request
    window: list[int]
    """Tokens that the network sees, the newest last."""
    generator: torch.Generator
    num_new: int = 0


class Batch:
    """Decodes up to ``max_texts`` requests at a time; the others wait, first come, first served."""

    def __init__(self, decoder: Decoder, *, max_texts: int) -> None:
        self.decoder = decoder
        self.max_texts = max_texts
        self._waiting: deque[_Text] = deque()
        self._active: list[_Text] = []  # in the decoder's rows

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + len(self._active)

    def add(self, key: Hashable, request: Request) -> None:
        """Queue a request; ``key`` names it in the results of step."""
        window = list(request.tokens)[-self.decoder.config.context_length :]
        generator = torch.Generator().manual_seed(request.seed)
        self._waiting.append(_Text(key=key, request=request, window=window, generator=generator))

    def cancel(self, key: Hashable) -> None:
        """Remove a request, waiting or being decoded; nothing happens where it is finished already."""
        self._waiting = deque(text for text in self._waiting if text.key != key)
        for row, text in enumerate(self._active):
            if text.key == key:
                self._remove(row)
                return

    def step(self) -> list[Step]:
        """One more token for every sequence being decoded, the first for new ones; empty when all are finished."""
        self._turn_full_windows()
        done: list[Step] = []
        if self._active:
            tokens = torch.tensor([text.window[-1] for text in self._active], device=self.decoder.device)
            if _are_greedy(self._active):
                drawn = self.decoder.step_greedy(tokens).tolist()
            else:
                drawn = _draw(self.decoder.step(tokens), self._active)
            done += self._extend(self._active, drawn)
            self._remove_finished(done)
        if self._waiting and len(self._active) < self.max_texts:
            taken = self._take()
            windows = [text.window for text in taken]
            if _are_greedy(taken):
                drawn = self.decoder.add_greedy(windows).tolist()
            else:
                drawn = _draw(self.decoder.add(windows), taken)
            self._active += taken
            read = self._extend(taken, drawn)
            self._remove_finished(read)
            done += read
        return done

    def _take(self) -> list[_Text]:
        """The next waiting texts that fit; at least one."""
        longest = 0
        taken: list[_Text] = []
        while self._waiting and len(self._active) + len(taken) < self.max_texts:
            longest = max(longest, len(self._waiting[0].window))
            if taken and longest * (len(taken) + 1) > PROMPT_TOKENS_AT_ONCE:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _turn_full_windows(self) -> None:
        """A full window continues with its newer half, read as a new prompt: see generation.generate_tokens."""
        length = self.decoder.config.context_length
        for row in reversed(range(len(self._active))):
            text = self._active[row]
            if len(text.window) > length:
                text.window = text.window[-max(1, length // 2) :]
                self._remove(row)
                self._waiting.appendleft(text)

    def _extend(self, texts: Sequence[_Text], tokens: Sequence[int]) -> list[Step]:
        """Append its new token to each sequence."""
        steps = []
        for text, token in zip(texts, tokens, strict=True):
            text.num_new += 1
            if token == text.request.stop_id:
                steps.append(Step(key=text.key, token=None, finished="stop"))
                continue
            text.window.append(token)
            finished: Reason | None = "length" if text.num_new >= text.request.max_new_tokens else None
            steps.append(Step(key=text.key, token=token, finished=finished))
        return steps

    def _remove_finished(self, steps: Sequence[Step]) -> None:
        finished = {step.key for step in steps if step.finished}
        for row in reversed(range(len(self._active))):
            if self._active[row].key in finished:
                self._remove(row)

    def _remove(self, row: int) -> None:
        self.decoder.remove(row)
        last = self._active.pop()
        if row < len(self._active):
            self._active[row] = last


def _are_greedy(texts: Sequence[_Text]) -> bool:
    return all(text.request.temperature == 0 for text in texts)


def _draw(logits: Tensor, texts: Sequence[_Text]) -> list[int]:
    """A token for each row of logits (B, V); rows with the same settings are drawn together."""
    groups: dict[tuple[float, int | None, float | None], list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        groups[text.request.temperature, text.request.top_k, text.request.top_p].append(row)
    drawn = torch.empty(len(texts), dtype=torch.int64, device=logits.device)
    for (temperature, top_k, top_p), rows in groups.items():
        chosen = logits if len(groups) == 1 else logits[rows]
        generators = [texts[row].generator for row in rows]
        drawn[rows] = sample_token(chosen, temperature, top_k, top_p, generators)
    tokens: list[int] = drawn.tolist()
    return tokens
