"""Continuous batching: requests of different lengths and settings enter and leave one Decoder while others run.

A request gives the same tokens alone and in a batch, now or later: its random numbers are its own, and the network
computes each sequence by itself (up to float32 rounding, which differs with the number of sequences by about 1e-7 of
a logit). Tokens are read back once a step, for all sequences together.

Rows are shared between groups, one for each request of a client: a text whose group has had few tokens takes the row of
one whose group has had many, which waits and is read again later. Groups are compared by levels that double, as in a
multi-level feedback queue (Corbato et al. 1962, An Experimental Time-Sharing System): few interruptions for long texts.

A step of many long texts takes several times that of one short text. So texts whose group has had far fewer tokens than
another's are decoded alone for a while between two steps of all, and a few rows are kept for the first tokens of small
requests: with those, the time of a short request among long ones stays near its time alone, and long ones keep half.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from model.decoding import Decoder
from model.generation import check_sampling, sample_token

PROMPT_TOKENS_AT_ONCE = 2048
"""Prompt tokens in one forward pass, padding included: sequences that are being decoded wait for it."""

FIRST_LEVEL_TOKENS = 16
"""Tokens, read or new, of a group below which nobody may interrupt it; every further level is twice as long."""

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


@dataclass(kw_only=True, eq=False)
class _Text:
    key: Hashable
    request: Request
    window: list[int]
    """Tokens that the network sees, the newest last."""
    generator: torch.Generator
    group: _Group
    number: int
    """Texts are numbered as they come."""
    num_new: int = 0


@dataclass(kw_only=True, eq=False)
class _Group:
    name: Hashable
    waiting: deque[_Text] = field(default_factory=deque)
    num_texts: int = 0
    """Texts that are not finished."""
    num_tokens: int = 0
    """Tokens that its texts have got so far."""
    num_read: int = 0
    """Tokens that were read for it, again for texts that had been interrupted: so rows change hands the more seldom
    the more that costs."""

    @property
    def level(self) -> int:
        return ((self.num_tokens + self.num_read) // FIRST_LEVEL_TOKENS).bit_length()


class Batch:
    """Decodes up to ``max_texts`` requests at a time; the others wait, first come, first served within a group.

    A group that has had far fewer tokens may take rows of another, but for the half of all rows whose texts came first.
    An eighth more rows are for the first tokens (FIRST_LEVEL_TOKENS) of groups that have no more texts than that.

    Args:
        clock: seconds; it decides how often texts of few tokens are decoded alone, and no token.
    """

    def __init__(self, decoder: Decoder, *, max_texts: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.decoder = decoder
        self.max_texts = max_texts
        self._extra_rows = max_texts // 8
        self._clock = clock
        self._all_seconds = self._few_seconds = 0.0  # of the last step of all, and of texts of few tokens alone
        self._spent = 0.0  # seconds in steps of the latter since the last step of all
        self._has_few = False  # whether there are such texts
        self._active: list[_Text] = []  # in the decoder's rows
        self._groups: dict[Hashable, _Group] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Requests that are not finished."""
        return sum(group.num_texts for group in self._groups.values())

    def add(self, key: Hashable, request: Request, *, group: Hashable = None) -> None:
        """Queue a request; ``key`` names it in the results of step, ``group`` the ones it shares its rows with."""
        window = list(request.tokens)[-self.decoder.config.context_length :]
        generator = torch.Generator().manual_seed(request.seed)
        found = self._groups.setdefault(group, _Group(name=group))
        found.num_texts += 1
        number = next(self._numbers)
        found.waiting.append(
            _Text(key=key, request=request, window=window, generator=generator, group=found, number=number)
        )

    def cancel(self, key: Hashable) -> None:
        """Remove a request, waiting or being decoded; nothing happens where it is finished already."""
        for row, text in enumerate(self._active):
            if text.key == key:
                self._remove(row)
                self._forget(text)
                return
        for group in list(self._groups.values()):
            for text in [text for text in group.waiting if text.key == key]:
                group.waiting.remove(text)
                self._forget(text)

    def step(self) -> list[Step]:
        """One more token for the sequences being decoded, the first for new ones; empty when all are finished.

        Not every sequence has a token in each step: those of few tokens may be ahead of the others.
        """
        self._turn_full_windows()
        self._leave_extra_rows()
        began = self._clock()
        first = self._first_row()
        done = self._decode(first)
        if first:
            self._few_seconds = self._clock() - began
        done += self._read(first)
        seconds = self._clock() - began
        if first:
            self._spent += seconds
        else:
            self._all_seconds, self._spent = seconds, 0.0
        return done

    def _decode(self, first: int) -> list[Step]:
        """The next token of the texts from row ``first`` on."""
        if not (texts := self._active[first:]):
            return []
        tokens = torch.tensor([text.window[-1] for text in texts], device=self.decoder.device)
        if _are_greedy(texts):
            drawn = self.decoder.step_greedy(tokens, first).tolist()
        else:
            drawn = _draw(self.decoder.step(tokens, first), texts)
        done = self._extend(texts, drawn)
        self._remove_finished(done)
        return done

    def _read(self, first: int) -> list[Step]:
        """The first token of texts that wait for a row, or one more of those that were interrupted."""
        if not (taken := self._take(first)):
            return []
        windows = [text.window for text in taken]
        if _are_greedy(taken):
            drawn = self.decoder.add_greedy(windows).tolist()
        else:
            drawn = _draw(self.decoder.add(windows), taken)
        self._active += taken
        done = self._extend(taken, drawn)
        self._remove_finished(done)
        return done

    def _first_row(self) -> int:
        """0 where all are decoded in this step, else the row from which on texts have had few tokens.

        Those are alone as long as they take no longer than the last step of all, and where that saves half of it.
        """
        levels = [text.group.level for text in self._active]
        few = [level == min(levels) < max(levels) - 1 for level in levels]
        first = len(few) - sum(few)
        self._has_few = any(few)
        if not self._has_few:
            self._few_seconds = 0.0  # of other texts
        if not self._has_few or self._few_seconds > min(self._all_seconds / 2, self._all_seconds - self._spent):
            return 0
        ahead = [row for row in range(first) if few[row]]
        behind = [row for row in range(first, len(few)) if not few[row]]
        for row, other in zip(ahead, behind, strict=True):
            self.decoder.swap(row, other)
            self._active[row], self._active[other] = self._active[other], self._active[row]
        return first

    def _leave_extra_rows(self) -> None:
        """Texts that have had their first tokens in the rows that are kept for these take one of the others."""
        while sum(text.group.num_tokens >= FIRST_LEVEL_TOKENS for text in self._active) > self.max_texts:
            victim = self._victim(0)
            assert victim is not None  # half of the rows are not protected
            self._interrupt(victim)

    def _take(self, first: int) -> list[_Text]:
        """The next waiting texts for which there is a row, free or to be taken from a longer group.

        Beside texts of few tokens, only one that was interrupted is read again in a step of all, none in another.
        """
        longest = 0
        taken: list[_Text] = []
        while (found := self._next(len(self._active) + len(taken))) is not None:
            group, victim = found
            if group.num_tokens and (first or (self._has_few and taken)):
                break
            longest = max(longest, len(group.waiting[0].window))
            if taken and longest * (len(taken) + 1) > PROMPT_TOKENS_AT_ONCE:
                break
            taken.append(group.waiting.popleft())
            group.num_read += len(taken[-1].window)
            if victim is not None:
                self._interrupt(victim)
        return taken

    def _next(self, num_rows: int) -> tuple[_Group, int | None] | None:
        """Whose turn it is where ``num_rows`` are taken, and whose row it gets, None for a free one."""
        waiting = sorted((it for it in self._groups.values() if it.waiting), key=lambda it: it.waiting[0].number)
        if waiting and num_rows < self.max_texts:
            return waiting[0], None
        small = [group for group in waiting if not group.num_tokens and group.num_texts <= self._extra_rows]
        if small and num_rows < self.max_texts + self._extra_rows:
            return small[0], None
        group = min(waiting, key=lambda it: it.level, default=None)
        victim = None if group is None else self._victim(group.level)
        return None if group is None or victim is None else (group, victim)

    def _victim(self, level: int) -> int | None:
        """The row that a text of a group at ``level`` may take; None where there is none.

        The half of the rows whose texts came first is not taken, so that no stream of short requests stops long ones.
        """
        by_age = sorted(range(len(self._active)), key=lambda row: self._active[row].number)
        rows = [row for row in by_age[self.max_texts // 2 :] if self._active[row].group.level > level]
        return max(rows, key=lambda row: (self._active[row].group.level, self._active[row].number), default=None)

    def _interrupt(self, row: int) -> None:
        """Let a text wait, the first of its group; its window is read again when it goes on.

        A full window continues with its newer half: see generation.generate_tokens.
        """
        text = self._active[row]
        length = self.decoder.config.context_length
        if len(text.window) > length:
            text.window = text.window[-max(1, length // 2) :]
        self._remove(row)
        text.group.waiting.appendleft(text)

    def _forget(self, text: _Text) -> None:
        text.group.num_texts -= 1
        if not text.group.num_texts:
            del self._groups[text.group.name]

    def _turn_full_windows(self) -> None:
        for row in reversed(range(len(self._active))):
            if len(self._active[row].window) > self.decoder.config.context_length:
                self._interrupt(row)

    def _extend(self, texts: Sequence[_Text], tokens: Sequence[int]) -> list[Step]:
        """Append its new token to each sequence."""
        steps = []
        for text, token in zip(texts, tokens, strict=True):
            text.num_new += 1
            text.group.num_tokens += 1
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
            if (text := self._active[row]).key in finished:
                self._remove(row)
                self._forget(text)

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
