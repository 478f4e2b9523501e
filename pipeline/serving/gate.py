"""What every request passes before a replica hears of it: host name, access token, body, number of requests at a time.

It stands in the process that listens, so the replicas know no token, and get whole bodies within the limits only. Of
the token only the hash is known here; it is compared in constant time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from typing import Any

from starlette.datastructures import Headers

from pipeline.config.inference import ServeConfig
from pipeline.errors import UserError
from pipeline.serving.openai_protocol import RequestError, error_response

COMPLETIONS = "/v1/completions"
LEAST_TOKEN_CHARACTERS = 16
_OPEN = ("/", "/healthz")  # these need no token
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
        self._num_requests = 0
        self._body_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_completion = scope["path"] == COMPLETIONS and scope["method"] == "POST"
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
        self._num_requests += is_completion
        try:
            await self._app(scope, _received(body, receive), send)
        finally:
            self._num_requests -= is_completion

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
        too_large = RequestError(f"the body has more than {most:,} bytes", status=413)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._config.request_seconds / 10):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += (chunk := message.get("body", b""))
                    self._body_bytes += len(chunk)
                    if len(body) > most:
                        raise too_large
                    if self._body_bytes > _BODIES_AT_ONCE * self._config.max_body_bytes:
                        message = "the server receives too many large requests; try again in a moment"
                        raise RequestError(message, status=429, code="rate_limit_exceeded")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RequestError("the body did not arrive in time", status=408) from None
        finally:
            self._body_bytes -= len(body)


def _received(body: bytes, receive: Any) -> Any:
    """``receive`` of a request whose body was taken from it already."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return messages.pop() if messages else await receive()

    return next_message
