"""One thread that decodes sequences in a batch, and asynchronous streams of their text: between web server and network.

Requests enter the running batch at the next token and leave it when they are finished, so that none waits for another
one's text to end: where all places are taken, a new request takes one from those that have had the most (Batch). A
stream that is closed early, by a client that disconnected, frees its place.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.batching import Batch, Reason, Request, Step
from pipeline.generation.sampling import Detokenizer
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

_Queue = asyncio.Queue  # of lists of (index, Step), or of None where the engine failed


class EngineError(RuntimeError):
    """The engine's thread failed; no more text is generated."""


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """The text that one more token added to one sequence of a request."""

    index: int
    """Number of the sequence within its request."""
    text: str
    num_tokens: int
    """Number of new tokens: 0 or 1."""
    finish_reason: Reason | None


class Engine:
    """Runs a Batch in a thread of its own; ``stream`` may be called from one event loop at a time."""

    def __init__(self, batch: Batch, tokenizer: Tokenizer) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._condition = threading.Condition()
        self._added: list[tuple[int, int, Request]] = []
        self._cancelled: list[int] = []
        self._owners: dict[int, tuple[asyncio.AbstractEventLoop, Any, int]] = {}
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
        """Yield the texts of ``requests`` token by token until all are finished. Close the iterator to cancel them."""
        self.check()
        queue: Any = _Queue()
        keys = self._submit(requests, queue)
        detokenizers = [Detokenizer(self._tokenizer, stop) for _ in requests]
        open_keys = set(keys)
        try:
            while open_keys:
                steps = await queue.get()
                if steps is None:
                    self.check()
                for index, step in steps:
                    if keys[index] not in open_keys:  # generated before the stop string was found
                        continue
                    delta = _delta(index, step, detokenizers[index])
                    if delta.finish_reason:
                        open_keys.discard(keys[index])
                        if step.finished is None:
                            self._cancel([keys[index]])
                    yield delta
        finally:
            self._cancel(open_keys)

    def _submit(self, requests: Sequence[Request], queue: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        with self._condition:
            keys = [next(self._keys) for _ in requests]
            for index, (key, request) in enumerate(zip(keys, requests, strict=True)):
                self._owners[key] = (loop, queue, index)
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
            for loop, queue, _ in owners.values():
                loop.call_soon_threadsafe(queue.put_nowait, None)

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
        """Wake each request once, whatever the number of its sequences."""
        grouped: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        targets: dict[int, tuple[asyncio.AbstractEventLoop, Any]] = {}
        with self._condition:
            for step in steps:
                key: Any = step.key
                owner = self._owners.pop(key, None) if step.finished else self._owners.get(key)
                if owner is not None:
                    loop, queue, index = owner
                    grouped[id(queue)].append((index, step))
                    targets[id(queue)] = loop, queue
        for number, group in grouped.items():
            loop, queue = targets[number]
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, group)


def _delta(index: int, step: Step, detokenizer: Detokenizer) -> TokenDelta:
    text = "" if step.token is None else detokenizer.add(step.token)
    reason = step.finished
    if reason and not detokenizer.is_stopped:
        text += detokenizer.end()
    if detokenizer.is_stopped:
        reason = "stop"
    return TokenDelta(index=index, text=text, num_tokens=int(step.token is not None), finish_reason=reason)
