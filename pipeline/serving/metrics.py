"""What the server counts, for Prometheus: requests, tokens, the queue, latencies.

The gate sees each request from its first byte to its last, and counts it. What only a replica knows (that the first
token is there, how many there are) comes as a message of type PROGRESS among those of its answer, and ends at the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

PROGRESS = "gpt25.progress"
_TOLD_AT_ONCE = 64  # tokens: a message for each would cost as much as the token
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ENDPOINTS = {
    **{"/": "page", "/health": "health", "/healthz": "health", "/metrics": "metrics"},
    **{"/v1/models": "models", "/v1/completions": "completions", "/v1/chat/completions": "chat"},
}


class Progress:
    """Told by the web application of a replica what one completion has made; puts it into messages.

    Args:
        put: takes a message.
    """

    def __init__(self, put: Callable[[dict[str, Any]], None]) -> None:
        self._put = put
        self._begun = time.monotonic()
        self._prompt_tokens = 0
        self._tokens = 0
        self._has_first = False

    def add_prompt(self, num_tokens: int) -> None:
        """Count the tokens of the prompts, once they are known to be served."""
        self._prompt_tokens += num_tokens

    def add(self, num_tokens: int) -> None:
        """Count new tokens; the first is told at once, the rest in larger numbers."""
        self._tokens += num_tokens
        if self._tokens and not self._has_first:
            self._has_first = True
            self.tell(first_token_seconds=time.monotonic() - self._begun)
        elif self._tokens >= _TOLD_AT_ONCE:
            self.tell()

    def tell(self, **more: float) -> None:
        """Put a message about what has not been told."""
        told = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, **more}
        self._prompt_tokens = self._tokens = 0
        if any(told.values()):
            self._put({"type": PROGRESS, **told})


class ServerMetrics:
    """The figures of one server; ``response`` is the page that Prometheus reads."""

    def __init__(self, *, most_requests: int) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "gpt25_requests",
            "Requests by what was asked for and HTTP status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "gpt25_prompt_tokens", "Tokens of the prompts of completions.", registry=self._registry
        )
        self._tokens = Counter("gpt25_completion_tokens", "Tokens that were generated.", registry=self._registry)
        self._in_progress = Gauge(
            "gpt25_requests_in_progress", "Completions that are not answered yet.", registry=self._registry
        )
        self._waiting = Gauge(
            "gpt25_requests_waiting",
            "Those of them that wait in the queue for their first token.",
            registry=self._registry,
        )
        Gauge(
            "gpt25_requests_limit", "Completions at a time, above which the answer is 429.", registry=self._registry
        ).set(most_requests)
        self._seconds = Histogram(
            "gpt25_request_seconds",
            "Seconds from the last byte of a completion's request to the end of its answer.",
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )
        self._first_seconds = Histogram(
            "gpt25_first_token_seconds",
            "Seconds from a completion's arrival at a replica to its first token, the queue included.",
            buckets=_FIRST_SECONDS,
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """Count a request of any kind that was answered, 499 where its client left before."""
        endpoint = _ENDPOINTS.get(path, "models" if path.startswith("/v1/models/") else "other")
        self._requests.labels(endpoint, str(status)).inc()

    def completion(self) -> Completing:
        """A completion that begins now."""
        return Completing(self)

    def response(self) -> Response:
        """All figures, in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Completing:
    """One completion from the moment that it is let in; a context manager, which ends it."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._begun = time.monotonic()
        self._is_waiting = True

    def __enter__(self) -> Completing:
        self._metrics._in_progress.inc()
        self._metrics._waiting.inc()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave_queue()
        self._metrics._in_progress.dec()
        self._metrics._seconds.observe(time.monotonic() - self._begun)

    def take(self, message: dict[str, Any]) -> None:
        """Count what a replica tells in a message of type PROGRESS."""
        self._metrics._prompt_tokens.inc(message["prompt_tokens"])
        self._metrics._tokens.inc(message["completion_tokens"])
        if "first_token_seconds" in message:
            self._leave_queue()
            self._metrics._first_seconds.observe(message["first_token_seconds"])

    def _leave_queue(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._metrics._waiting.dec()
