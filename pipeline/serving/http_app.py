"""The web application around one Engine: completions, chats, models, health, a page to try both. ASGI, by Starlette.

Everything that a request can use is bounded: seconds, prompts, tokens here; bytes, requests at a time and who may ask
at the gate (gate.py). A faulty request is answered with a status of 4xx and a sentence in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from model.batching import Reason
from pipeline.config.inference import ServeConfig
from pipeline.conversations.templates import Chat
from pipeline.serving import chat_completions
from pipeline.serving.engine import Engine, EngineError, TokenDelta
from pipeline.serving.metrics import Progress
from pipeline.serving.openai_protocol import (
    Answer,
    Completion,
    Limits,
    RequestError,
    error_response,
    json_response,
    parse,
    to_json,
)
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")


class WebApp:
    """Answers requests from one Engine; ``app`` is what stands behind the gate.

    Args:
        chat: how the messages of a chat become tokens; None where the model has no template for them.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, chat: Chat | None, limits: Limits, config: ServeConfig
    ) -> None:
        self._engine, self._tokenizer, self._chat = engine, tokenizer, chat
        self._limits, self._config = limits, config
        self._started = int(time.time())
        routes = [
            Route("/", self._guarded(self._page)),
            Route("/health", self._guarded(self._health)),
            Route("/healthz", self._guarded(self._health)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat_completions), methods=["POST"]),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    def _guarded(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """``answer``, whose errors become answers."""

        async def guarded(request: Request) -> Response:
            try:
                response: Response = await answer(request)
            except RequestError as error:
                return error_response(error)
            except EngineError as error:
                return error_response(RequestError(str(error), status=503))
            except ClientDisconnect:
                return Response(status_code=499)  # the client is gone
            return response

        return guarded

    async def _page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self._page_policy, "X-Content-Type-Options": "nosniff"}
        return Response(self._page_html, media_type="text/html; charset=utf-8", headers=headers)

    async def _health(self, request: Request) -> Response:
        self._engine.check()
        return json_response({"status": "ok", "model": self._limits.model_name, "texts": self._engine.num_texts})

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_entry]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._limits.model_name:
            message = f"model {name[:100]!r} is not served here; the model is {self._limits.model_name!r}"
            raise RequestError(message, status=404, code="model_not_found")
        return json_response(self._model_entry)

    async def _completions(self, request: Request) -> Response:
        return await self._complete(request, lambda body: parse(body, self._limits, self._tokenizer), Answer)

    async def _chat_completions(self, request: Request) -> Response:
        def parse_chat(body: bytes) -> Completion:
            return chat_completions.parse(body, self._limits, self._chat)

        return await self._complete(request, parse_chat, chat_completions.ChatAnswer)

    async def _complete(
        self, request: Request, parse_body: Callable[[bytes], Completion], answer_type: type[Answer]
    ) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the body must be JSON; send Content-Type: application/json", status=415)
        deadline = time.monotonic() + self._config.request_seconds
        completion = parse_body(await request.body())
        answer = answer_type(completion, self._limits.model_name)
        progress: Progress | None = request.scope.get("progress")
        if progress is not None:
            progress.add_prompt(completion.prompt_tokens)
            completion = replace(completion, on_tokens=progress.add)
        if not completion.stream:
            return await self._whole(request, completion, answer, deadline)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = self._events(completion, answer, deadline)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _whole(self, request: Request, completion: Completion, answer: Answer, deadline: float) -> Response:
        texts = list(completion.heads)
        reasons: list[Reason | None] = [None] * len(texts)
        num_tokens = 0
        async for delta in self._deltas(completion, deadline):
            texts[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason
            num_tokens += delta.num_tokens
            if await request.is_disconnected():
                raise ClientDisconnect
        return json_response(answer.whole(texts, reasons, num_tokens))

    async def _events(self, completion: Completion, answer: Answer, deadline: float) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each part of a text, the token counts if requested, [DONE]."""
        num_tokens = 0
        try:
            for chunk in answer.first_chunks():
                yield _event(to_json(chunk))
            async for delta in self._deltas(completion, deadline):
                num_tokens += delta.num_tokens
                if delta.text or delta.finish_reason:
                    yield _event(to_json(answer.chunk(delta.index, delta.text, delta.finish_reason)))
            if completion.include_usage:
                yield _event(to_json(answer.usage_chunk(num_tokens)))
            yield _event(b"[DONE]")
        except RequestError as error:  # the status line has been sent
            yield _event(to_json(error.body))
        except EngineError as error:
            yield _event(to_json(RequestError(str(error), status=503).body))

    async def _deltas(self, completion: Completion, deadline: float) -> AsyncIterator[TokenDelta]:
        """The engine's stream until the deadline; it is closed in any case, so that its sequences leave the batch."""
        async with aclosing(self._engine.stream(completion.requests, completion.stop)) as stream:  # type: ignore[type-var]
            while True:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        delta = await anext(stream)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    message = f"the text was not finished within {self._config.request_seconds:g} seconds; ask for less"
                    raise RequestError(message, status=408, code="timeout") from None
                if completion.on_tokens is not None:
                    completion.on_tokens(delta.num_tokens)
                yield delta

    @property
    def _model_entry(self) -> dict[str, Any]:
        name = self._limits.model_name
        return {"id": name, "object": "model", "created": self._started, "owned_by": "gpt-2.5"}

    @cached_property
    def _page_html(self) -> str:
        page = PAGE.read_text(encoding="utf-8")
        return page.replace('data-chat="no"', 'data-chat="yes"') if self._chat else page

    @cached_property
    def _page_policy(self) -> str:
        """The page's own script and style, by their hashes, and requests to this server; nothing else."""
        hashes = {}
        for name in ("script", "style"):
            content = self._page_html.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
            hashes[name] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return (
            f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the same shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    reasons = {
        404: "there is nothing at this path; see /v1/models and /v1/completions",
        405: "this path takes another method",
    }
    return error_response(RequestError(reasons.get(status, "the request was refused"), status=status))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
