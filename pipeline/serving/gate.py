"""What every request passes before a replica hears of it: host name, access token, body, number of requests at a time.

It counts what passes and answers /metrics itself: it alone sees all requests, those that it refuses among them.

It stands in the process that listens, so the replicas know no token, and get whole bodies within the limits only. Of
the token only the hash is known here; it is compared in constant time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from pipeline.config.inference import ServeConfig
from pipeline.errors import UserError
from pipeline.serving.metrics import PROGRESS, Progress, ServerMetrics
from pipeline.serving.openai_protocol import RequestError, error_response

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
METRICS = "/metrics"
LEAST_TOKEN_CHARACTERS = 16
_OPEN = ("/", "/health", "/healthz")  # these need no token
_BODIES_AT_ONCE = 64  # times max_body_bytes: bytes of all bodies that are being received
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")


def token_hash(token: str, variable: str) -> str:
    """SHA-256 of an access token, hexadecimal; UserError, which names ``variable``, where it is none to rely on."""
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{variable} has white space or other than ASCII characters, which clients cannot send")
    if len(token) < LEAST_TOKEN_CHARACTERS:
        raise UserError(
            f"{variable} has {len(token)} characters; give at least {LEAST_TOKEN_CHARACTERS} random ones, such as what "
            "`openssl rand -hex 16` prints"
        )
    return hashlib.sha256(token.encode()).hexdigest()


class Gate:
    """An ASGI application around ``app``.

    Args:
        app: gets the body of a request as one message.
        token_sha256: SHA-256 of the access token, hexadecimal; None where no token is needed.
    """

    def __init__(self, app: Any, config: ServeConfig, *, token_sha256: str | None) -> None:
        self._app, self._config, self._token_sha256 = app, config, token_sha256
        self._most_requests = config.max_waiting * config.num_replicas
        self._metrics = ServerMetrics(most_requests=self._most_requests)
        self._num_requests = 0
        self._arrivals: dict[_Arrival, None] = {}  # the oldest first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 499  # the client left before an answer began

        async def noting(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._answer(scope, receive, noting)
        finally:
            self._metrics.count(scope["path"], status)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        is_completion = scope["path"] in COMPLETIONS and scope["method"] == "POST"
        try:
            self._check(scope)
            body = await self._body(scope, receive, self._config.max_body_bytes if is_completion else 0)
            if is_completion and self._num_requests >= self._most_requests:
                message = f"the server has {self._num_requests} requests already; try again in a moment"
                raise RequestError(message, status=429, code="rate_limit_exceeded")
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return  # the client is gone
        if scope["path"] == METRICS and scope["method"] in ("GET", "HEAD"):
            await self._metrics.response()(scope, receive, send)
        elif is_completion:
            await self._complete(scope, _received(body, receive), send)
        else:
            await self._app(scope, _received(body, receive), send)

    async def _complete(self, scope: Any, receive: Any, send: Any) -> None:
        self._num_requests += 1
        try:
            with self._metrics.completion() as completion:

                async def sending(message: dict[str, Any]) -> None:
                    if message["type"] == PROGRESS:
                        completion.take(message)
                    else:
                        await send(message)

                # An application in this process tells at once; a replica has its own, and sends what it tells.
                progress = Progress(completion.take)
                try:
                    await self._app({**scope, "progress": progress}, receive, sending)
                finally:
                    progress.tell()
        finally:
            self._num_requests -= 1

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Another name, where only this machine can connect, is a web page that pretends (DNS rebinding).
        if self._config.is_local and not _LOCAL_HOST.fullmatch(host):
            raise RequestError(f"this server answers to localhost, not to {host[:100]!r}", status=403)
        if self._token_sha256 is None or scope["path"] in _OPEN:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        if not hmac.compare_digest(found, self._token_sha256) or scheme.lower() != "bearer":
            message = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            raise RequestError(message, status=401, code="invalid_api_key")

    async def _body(self, scope: Any, receive: Any, most: int) -> bytes | None:
        """The whole body, None where the client left; RequestError where it is too large or too slow."""
        body = bytearray()
        message = f"the body has more than {most:,} bytes" if most else "this path takes no body; see /v1/completions"
        too_large = RequestError(message, status=413)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        arrival = _Arrival(asyncio.timeout(self._config.request_seconds / 10))
        self._arrivals[arrival] = None
        try:
            async with arrival.deadline:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
                    self._make_room(arrival, len(body))
        except TimeoutError:
            if arrival.gives_way:
                message = "the server receives too many large requests; try again in a moment"
                raise RequestError(message, status=429, code="rate_limit_exceeded") from None
            raise RequestError("the body did not arrive in time", status=408) from None
        finally:
            del self._arrivals[arrival]

    def _make_room(self, arrival: _Arrival, num_bytes: int) -> None:
        """Note what a body holds; where all together hold too much, the ones that began first give way.

        So those who send half a body and wait keep nobody out who sends a whole one.
        """
        arrival.num_bytes = num_bytes
        too_many = sum(it.num_bytes for it in self._arrivals) - _BODIES_AT_ONCE * self._config.max_body_bytes
        for oldest in self._arrivals:
            if too_many <= 0:
                return
            if oldest.num_bytes and not oldest.deadline.expired():
                too_many -= oldest.num_bytes
                oldest.num_bytes, oldest.gives_way = 0, True
                oldest.deadline.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class _Arrival:
    """A body that is being received."""

    deadline: asyncio.Timeout
    num_bytes: int = 0
    gives_way: bool = False


def _received(body: bytes, receive: Any) -> Any:
    """``receive`` of a request whose body was taken from it already."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    return next_message
