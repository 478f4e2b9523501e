"""OpenAI's completions protocol: what a request may say, what is answered. Knows no network and no web server.

A request that cannot be served is a RequestError: a status of 4xx and one sentence, in OpenAI's shape. Fields that this
server would have to ignore are refused by name, so that nobody takes the default for what was asked.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.batching import Reason, Request
from pipeline.errors import UserError
from pipeline.generation.sampling import encode_prompt
from pipeline.tokenizer.bpe import Tokenizer

_MAX_STOPS = 4
_MAX_STOP_CHARACTERS = 200
_MAX_TEMPERATURE = 10.0
_FIELDS = ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "stop")
_ACCEPTED = (*_FIELDS, "seed", "echo", "user")
# Asked for, they would change the answer; as they stand here they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
}


class RequestError(Exception):
    """A request that is not served; ``status`` and OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    model_name: str
    context_length: int
    vocab_size: int
    max_prompt_tokens: int
    max_tokens: int
    max_texts: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A request that is served: its texts, and how to answer."""

    requests: tuple[Request, ...]
    """The samples of the first prompt, then those of the second, ...: the choices by their index."""
    heads: tuple[str, ...]
    """What each choice begins with: the prompt where it is to be echoed."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """A last chunk with the counts, in a stream."""
    prompt_tokens: int


def parse(body: bytes, limits: Limits, tokenizer: Tokenizer) -> Completion:
    """The request in a body; RequestError with a sentence about what is wrong with it."""
    values = _read(body)
    _refuse_unknown(values)
    if "prompt" not in values:
        raise RequestError("prompt is missing; give a text, or a list of texts", param="prompt")
    model = values.get("model", limits.model_name)
    if model != limits.model_name:
        message = f"model {_shown(model)} is not served here; the model is {limits.model_name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    prompts = _prompts(values["prompt"])
    count = _whole(values, "n", 1, 1, limits.max_texts)
    if len(prompts) * count > limits.max_texts:
        raise RequestError(
            f"{len(prompts)} prompts times n {count} are more than the {limits.max_texts} texts of one request",
            param="n",
        )
    stop = _stop(values.get("stop"))
    encoded = [_encode(prompt, limits, tokenizer) for prompt in prompts]
    seed = _whole(values, "seed", secrets.randbits(48), -(2**63), 2**63 - limits.max_texts)
    settings: dict[str, Any] = {
        "max_new_tokens": _whole(values, "max_tokens", 16, 1, limits.max_tokens),
        "temperature": _number(values, "temperature", 1.0, 0.0, _MAX_TEMPERATURE),
        "top_p": _top_p(values),
        "top_k": _whole(values, "top_k", 0, 0, limits.vocab_size) or None,
        "stop_id": tokenizer.eot_id,
    }
    echo = _flag(values, "echo")
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    return Completion(
        requests=tuple(
            Request(tokens=ids, seed=seed + sample, **settings) for ids in encoded for sample in range(count)
        ),
        heads=tuple(text if echo else "" for text in texts for _ in range(count)),
        stop=stop,
        stream=_flag(values, "stream"),
        include_usage=_include_usage(values.get("stream_options")),
        prompt_tokens=sum(map(len, encoded)),
    )


class Answer:
    """The JSON of one answer, whole or chunk by chunk."""

    def __init__(self, completion: Completion, model_name: str) -> None:
        self._completion = completion
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[Reason | None], num_tokens: int) -> dict[str, Any]:
        choices = [
            _choice(index, text, reason) for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._common, "choices": choices, "usage": self._usage(num_tokens)}

    def chunk(self, index: int, text: str, reason: Reason | None) -> dict[str, Any]:
        return {**self._common, "choices": [_choice(index, text, reason)]}

    def usage_chunk(self, num_tokens: int) -> dict[str, Any]:
        return {**self._common, "choices": [], "usage": self._usage(num_tokens)}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        prompt_tokens = self._completion.prompt_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": prompt_tokens + num_tokens,
        }


def to_json(values: Mapping[str, Any]) -> bytes:
    """ASCII, because a prompt may hold half a surrogate pair, which UTF-8 cannot write."""
    return json.dumps(values, separators=(",", ":")).encode("ascii")


def _choice(index: int, text: str, reason: Reason | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _read(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {_shown(str(error), 200)}") from error
    if not isinstance(values, dict):
        raise RequestError("the body is not a JSON object")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_unknown(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in _ACCEPTED:
            continue
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, _ACCEPTED, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"unknown field {_shown(name)}{hint}", param=name[:100])
        if value not in _NEUTRAL[name]:
            raise RequestError(f"{name} is not supported by this server; leave it out", param=name)


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, ids or lists of ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RequestError("prompt must be a text, a list of texts, or token ids", param="prompt")
    for item in value:
        is_ids = isinstance(item, list) and item and all(type(token) is int for token in item)
        if not isinstance(item, str) and not is_ids:
            raise RequestError("prompt must be a text, a list of texts, or token ids", param="prompt")
    return list(value)


def _encode(prompt: str | list[int], limits: Limits, tokenizer: Tokenizer) -> list[int]:
    most = min(limits.max_prompt_tokens, limits.context_length)
    if isinstance(prompt, str):
        try:
            return encode_prompt(tokenizer, prompt, most)
        except UserError as error:
            raise RequestError(str(error), param="prompt", code="context_length_exceeded") from error
    if len(prompt) > most:
        message = f"the prompt has {len(prompt):,} tokens, the model sees {most:,}; shorten it"
        raise RequestError(message, param="prompt", code="context_length_exceeded")
    wrong = [token for token in prompt if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise RequestError(
            f"the prompt has the id {_shown(wrong[0])}; ids are below {tokenizer.vocab_size}", param="prompt"
        )
    return prompt


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop must be a text or a list of at most {_MAX_STOPS} texts", param="stop")
    if any(not 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"a text of stop must have 1 to {_MAX_STOP_CHARACTERS} characters", param="stop")
    return tuple(stops)


def _include_usage(value: Any) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not set(value) <= {"include_usage"}:
        raise RequestError("stream_options may hold include_usage only", param="stream_options")
    return _flag(value, "include_usage")


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {_shown(value)}; it must be true or false", param=name)
    return bool(value)


def _whole(values: dict[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not int or not lowest <= value <= highest:
        raise RequestError(
            f"{name} is {_shown(value)}; it must be a whole number from {lowest} to {highest}", param=name
        )
    return value


def _number(values: dict[str, Any], name: str, default: float, lowest: float, highest: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not lowest <= value <= highest or not math.isfinite(value):
        raise RequestError(f"{name} is {_shown(value)}; it must be a number from {lowest:g} to {highest:g}", param=name)
    return float(value)


def _top_p(values: dict[str, Any]) -> float | None:
    top_p = _number(values, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise RequestError("top_p is 0; it must be above 0 and at most 1", param="top_p")
    return None if top_p == 1 else top_p


def _shown(value: Any, most: int = 60) -> str:
    text = value if isinstance(value, str) and most > 60 else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
