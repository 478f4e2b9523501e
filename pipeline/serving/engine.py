"""One thread that decodes sequences in a batch, and asynchronous streams of their text: between web server and network.

Requests enter the running batch at the next token and leave it when they are finished, so that none waits for another
one's text to end: where all places are taken, a new request takes one from those that have had the most (Batch). A
stream that is closed early, by a client that disconnected, frees its place.

A stream has its first token and its end at once, and between them what has come since the last delivery,
DELIVERIES_PER_SECOND times a second: with many streams of a small model the messages take more of the machine than the
network does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.batching import Batch, Reason, Request, Step
from pipeline.generation.sampling import Detokenizer
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

DELIVERIES_PER_SECOND = 25
"""More often than the eye follows."""


class EngineError(RuntimeError):
    """The engine's thread failed; no more text is generated."""


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """The text that more tokens added to one sequence of a request."""

    index: int
    """Number of the sequence within its request."""
    text: str
    num_tokens: int
    """Number of new tokens; 0 where the sequence ended before one."""
    finish_reason: Reason | None


@dataclass(kw_only=True, eq=False)
class _Inbox:
    """Where the steps of one request go. Its queue is of dicts from index to steps, or of None: the engine failed."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[dict[int, list[Step]] | None] = field(default_factory=asyncio.Queue)
    steps: dict[int, list[Step]] = field(default_factory=dict)
    """By the index of their sequence: what is not delivered yet."""
    due: float = 0.0
    """When they are delivered, in seconds of the engine's clock."""

    def deliver(self, found: dict[int, list[Step]] | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, found)


class Engine:
    """Runs a Batch in a thread of its own; ``stream`` may be called from one event loop at a time.

    Args:
        clock: seconds; it decides in how many parts a text is delivered, and none of its tokens.
    """

    def __init__(self, batch: Batch, tokenizer: Tokenizer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._clock = clock
        self._condition = threading.Condition()
        self._added: list[tuple[int, int, Request]] = []
        self._cancelled: list[int] = []
        self._owners: dict[int, tuple[_Inbox, int]] = {}
        self._undelivered: set[_Inbox] = set()
        self._keys = itertools.count()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="text-engine", daemon=True)
        self._thread.start()

    @property
    def num_texts(self) -> int:
        """Number of sequences that are being decoded or wait for a place."""
        with self._condition:
            return len(self._owners)

    def check(self) -> None:
        """Raise EngineError where the thread has failed."""
        if self._failure is not None:
            raise EngineError(f"text generation failed: {self._failure!r}")

    def close(self) -> None:
        """End the thread after its current step."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    async def stream(self, requests: Sequence[Request], stop: Sequence[str] = ()) -> AsyncIterator[TokenDelta]:
        """Yield the texts of ``requests`` part by part until all are finished. Close the iterator to cancel them."""
        self.check()
        inbox = _Inbox(loop=asyncio.get_running_loop())
        keys = self._submit(requests, inbox)
        detokenizers = [Detokenizer(self._tokenizer, stop) for _ in requests]
        open_keys = set(keys)
        try:
            while open_keys:
                found = await inbox.queue.get()
                if found is None:
                    self.check()
                    continue
                for index, steps in found.items():
                    if keys[index] not in open_keys:  # generated before the stop string was found
                        continue
                    delta = _delta(index, steps, detokenizers[index])
                    if delta.finish_reason:
                        open_keys.discard(keys[index])
                        if steps[-1].finished is None:
                            self._cancel([keys[index]])
                    yield delta
        finally:
            self._cancel(open_keys)

    def _submit(self, requests: Sequence[Request], inbox: _Inbox) -> list[int]:
        with self._condition:
            keys = [next(self._keys) for _ in requests]
            for index, (key, request) in enumerate(zip(keys, requests, strict=True)):
                self._owners[key] = (inbox, index)
                self._added.append((key, keys[0], request))
            self._condition.notify()
        return keys

    def _cancel(self, keys: Any) -> None:
        with self._condition:
            for key in keys:
                if self._owners.pop(key, None) is not None:
                    self._cancelled.append(key)

    def _run(self) -> None:
        try:
            while self._take_changes():
                self._deliver(self._batch.step())
        except Exception as error:  # whatever it is, waiting requests must be told
            logger.exception("text generation failed")
            self._failure = error
            with self._condition:
                owners, self._owners = self._owners, {}
            for inbox in {inbox for inbox, _ in owners.values()}:
                inbox.deliver(None)

    def _take_changes(self) -> bool:
        """Wait for work, then add and cancel requests in the batch; False when the engine is closed."""
        with self._condition:
            while not (self._added or self._cancelled or len(self._batch) or self._is_closed):
                self._condition.wait()
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
        for key, group, request in added:
            self._batch.add(key, request, group=group)
        for key in cancelled:
            self._batch.cancel(key)
        return not self._is_closed

    def _deliver(self, steps: Sequence[Step]) -> None:
        """Wake each request whose delivery is due, once for all its sequences."""
        now = self._clock()
        with self._condition:
            for step in steps:
                key: Any = step.key
                owner = self._owners.pop(key, None) if step.finished else self._owners.get(key)
                if owner is not None:
                    inbox, index = owner
                    inbox.steps.setdefault(index, []).append(step)
                    inbox.due = now if step.finished else inbox.due
                    self._undelivered.add(inbox)
        for inbox in [inbox for inbox in self._undelivered if inbox.due <= now]:
            self._undelivered.remove(inbox)
            inbox.deliver(inbox.steps)
            inbox.steps, inbox.due = {}, now + 1 / DELIVERIES_PER_SECOND


def _delta(index: int, steps: Sequence[Step], detokenizer: Detokenizer) -> TokenDelta:
    """What the steps of one sequence add to its text, up to a stop string."""
    text, num_tokens = "", 0
    reason: Reason | None = None
    for step in steps:
        text += "" if step.token is None else detokenizer.add(step.token)
        num_tokens += step.token is not None
        reason = "stop" if detokenizer.is_stopped else step.finished
        if reason:
            break
    if reason and not detokenizer.is_stopped:
        text += detokenizer.end()
        reason = "stop" if detokenizer.is_stopped else reason
    return TokenDelta(index=index, text=text, num_tokens=num_tokens, finish_reason=reason)
