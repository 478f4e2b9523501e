"""One thread that makes texts grow, and asynchronous streams of what it makes: between a web server and the network.

Requests are taken into the running batch at the next token and leave it when they are finished, so nobody waits for
another's text to end. A stream that is closed early, by a client that went away, gives its place back.
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
from pipeline.generation.sampling import TextPieces
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

_Queue = asyncio.Queue  # of lists of (index, Step), or of None where the engine failed


class EngineError(RuntimeError):
    """The thread ended by an error; no text will come."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What was added to one text of a request."""

    index: int
    """Of the text within its request."""
    piece: str
    num_tokens: int
    """New ones: 0 or 1."""
    finished: Reason | None


class Engine:
    """Runs a Batch in a thread of its own; ``grow`` may be called from one event loop at a time."""

    def __init__(self, batch: Batch, tokenizer: Tokenizer) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._condition = threading.Condition()
        self._added: list[tuple[int, Request]] = []
        self._cancelled: list[int] = []
        self._owners: dict[int, tuple[asyncio.AbstractEventLoop, Any, int]] = {}
        self._keys = itertools.count()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="text-engine", daemon=True)
        self._thread.start()

    @property
    def num_texts(self) -> int:
        """Texts that are not finished: in progress or waiting."""
        with self._condition:
            return len(self._owners)

    def check(self) -> None:
        """Raise EngineError where the thread has ended by an error."""
        if self._failure is not None:
            raise EngineError(f"text generation failed: {self._failure!r}")

    def close(self) -> None:
        """End the thread after its current step."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    async def grow(self, requests: Sequence[Request], stop: Sequence[str] = ()) -> AsyncIterator[Growth]:
        """The texts of ``requests`` as they grow, until all are finished. Close the iterator to give up early."""
        self.check()
        queue: Any = _Queue()
        keys = self._submit(requests, queue)
        texts = [TextPieces(self._tokenizer, stop) for _ in requests]
        open_keys = set(keys)
        try:
            while open_keys:
                steps = await queue.get()
                if steps is None:
                    self.check()
                for index, step in steps:
                    if keys[index] not in open_keys:  # drawn before the stop string was seen
                        continue
                    growth = _growth(index, step, texts[index])
                    if growth.finished:
                        open_keys.discard(keys[index])
                        if step.finished is None:
                            self._cancel([keys[index]])
                    yield growth
        finally:
            self._cancel(open_keys)

    def _submit(self, requests: Sequence[Request], queue: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        with self._condition:
            keys = [next(self._keys) for _ in requests]
            for index, (key, request) in enumerate(zip(keys, requests, strict=True)):
                self._owners[key] = (loop, queue, index)
                self._added.append((key, request))
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
        except Exception as error:  # whatever it is, those who wait must hear of it
            logger.exception("text generation failed")
            self._failure = error
            with self._condition:
                owners, self._owners = self._owners, {}
            for loop, queue, _ in owners.values():
                loop.call_soon_threadsafe(queue.put_nowait, None)

    def _take_changes(self) -> bool:
        """Wait for work and bring the batch up to date; False when the engine is closed."""
        with self._condition:
            while not (self._added or self._cancelled or len(self._batch) or self._is_closed):
                self._condition.wait()
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
        for key, request in added:
            self._batch.add(key, request)
        for key in cancelled:
            self._batch.cancel(key)
        return not self._is_closed

    def _deliver(self, steps: Sequence[Step]) -> None:
        """One wake-up for each request, whatever the number of its texts."""
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
        for number, found in grouped.items():
            loop, queue = targets[number]
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, found)


def _growth(index: int, step: Step, text: TextPieces) -> Growth:
    piece = "" if step.token is None else text.add(step.token)
    finished = step.finished
    if finished and not text.is_stopped:
        piece += text.end()
    if text.is_stopped:
        finished = "stop"
    return Growth(index=index, piece=piece, num_tokens=int(step.token is not None), finished=finished)
