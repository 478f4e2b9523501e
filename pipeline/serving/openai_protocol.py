"""OpenAI's completions protocol: requests are checked, answers get its JSON form; independent of the network.

What completions and chats (chat_completions.py) have in common is here, and what completions have alone.

A request that cannot be served is a RequestError: a status of 4xx and one sentence, in OpenAI's shape. Fields that this
server would have to ignore are refused by name, so that nobody mistakes the default for the requested value.
"""

from __future__ import annotations

import difflib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from model.batching import Reason, Request
from pipeline.errors import UserError
from pipeline.generation.sampling import encode_prompt
from pipeline.tokenizer.bpe import Tokenizer

_MAX_STOPS = 4
_MAX_STOP_CHARACTERS = 200
_MAX_TEMPERATURE = 10.0
Neutral: TypeAlias = dict[str, tuple[Any, ...]]
# Fields of OpenAI's that are not supported, with the values under which they change nothing. The types count, too:
# logprobs 0 asks for the logprobs of the chosen tokens, though 0 == False.
_NEUTRAL: Neutral = {
    "logprobs": (None, False),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
}


class RequestError(Exception):
    """Raised for a request that is not served; has the HTTP ``status`` and OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request."""

    model_name: str
    vocab_size: int
    context_length: int
    max_prompt_tokens: int
    max_tokens: int
    max_texts: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A valid request: one generation request for each text, and the form of the answer."""

    requests: tuple[Request, ...]
    """The samples of the first prompt, then those of the second, ...: the choices by their index."""
    heads: tuple[str, ...]
    """Beginning of the text of each choice: the prompt if it is echoed, else empty."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends with a chunk that has the token counts."""
    prompt_tokens: int
    on_tokens: Callable[[int], None] | None = None
    """Told the number of new tokens, as they come."""


Ids = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Body(BaseModel):
    """The fields that all requests have. Types are strict: neither "5" nor true is a number."""

    model_config = ConfigDict(strict=True)
    neutral: ClassVar[Neutral] = _NEUTRAL
    """Fields that are not supported, with the values that are taken."""
    asked: ClassVar[tuple[str, str, str]]
    """The field of what is to be answered; how it is to be given, where it is missing; what it must be."""

    model: Any = None
    temperature: float = Field(1.0, ge=0, le=_MAX_TEMPERATURE, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = 0
    n: int = 1
    seed: int = Field(default_factory=lambda: secrets.randbits(48))
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    user: Any = None


AnyBody = TypeVar("AnyBody", bound=Body)


class _TextBody(Body):
    """The fields of a completion's request."""

    neutral = _NEUTRAL | {"suffix": (None, ""), "best_of": (None, 1)}
    asked = ("prompt", "give a text, or a list of texts", "a text, a list of texts, or token ids")

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1)]
    max_tokens: int = 16
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def parse(content: bytes, limits: Limits, tokenizer: Tokenizer) -> Completion:
    """The request for a completion in a body; RequestError with a sentence about what is wrong with it."""
    body = read_body(content, _TextBody, limits)
    if len(body.prompts) * body.n > limits.max_texts:
        raise RequestError(
            f"{len(body.prompts)} prompts times n {body.n} are more than the {limits.max_texts} texts of one request",
            param="n",
        )
    encoded = [_encode(prompt, limits, tokenizer) for prompt in body.prompts]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompts]
    heads = [text if body.echo else "" for text in texts]
    return completion_of(body, encoded, heads, max_tokens=body.max_tokens, stop_id=tokenizer.eot_id)


def completion_of(
    body: Body, encoded: Sequence[list[int]], heads: Sequence[str], *, max_tokens: int, stop_id: int
) -> Completion:
    """What is generated for the prompts ``encoded``, each n times."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": body.temperature,
        "top_p": None if body.top_p == 1 else body.top_p,
        "top_k": body.top_k or None,
        "stop_id": stop_id,
    }
    return Completion(
        requests=tuple(
            Request(tokens=ids, seed=body.seed + sample, **settings) for ids in encoded for sample in range(body.n)
        ),
        heads=tuple(head for head in heads for _ in range(body.n)),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        prompt_tokens=sum(map(len, encoded)),
    )


class Answer:
    """The JSON of one completion, whole or chunk by chunk; of a chat in a class of its own."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, completion: Completion, model_name: str) -> None:
        self._completion = completion
        self._id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._common = {"created": int(time.time()), "model": model_name}

    def whole(self, texts: Sequence[str], reasons: Sequence[Reason | None], num_tokens: int) -> dict[str, Any]:
        choices = [
            _choice(index, self.content(text), reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        head = {"id": self._id, "object": self.kind, **self._common}
        return {**head, "choices": choices, "usage": self._usage(num_tokens)}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with, before there is a token."""
        return [self.chunk(index, head, None) for index, head in enumerate(self._completion.heads) if head]

    def chunk(self, index: int, text: str, reason: Reason | None) -> dict[str, Any]:
        return self._chunk([_choice(index, self.part(text), reason)])

    def usage_chunk(self, num_tokens: int) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self._usage(num_tokens)}

    def content(self, text: str) -> dict[str, Any]:
        """A whole text, as a choice has it."""
        return {"text": text}

    def part(self, text: str) -> dict[str, Any]:
        """The next part of a text, as a choice of a stream has it."""
        return {"text": text}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": self.chunk_kind, **self._common, "choices": choices}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        prompt_tokens = self._completion.prompt_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": prompt_tokens + num_tokens,
        }


def to_json(values: Mapping[str, Any]) -> bytes:
    """JSON in ASCII, because a prompt may hold half a surrogate pair, which UTF-8 cannot encode."""
    return json.dumps(values, separators=(",", ":")).encode("ascii")


def json_response(values: Mapping[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(values), status_code=status, media_type="application/json", headers=headers)


def error_response(error: RequestError) -> Response:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return json_response(error.body, status=error.status, headers=headers)


def _choice(index: int, content: dict[str, Any], reason: Reason | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def read_body(content: bytes, kind: type[AnyBody], limits: Limits) -> AnyBody:
    """The fields of a request; RequestError with a sentence about the first that is wrong."""
    values = _read_json(content)
    _refuse_unknown(values, kind)
    if values.get("model", limits.model_name) != limits.model_name:
        message = f"model {shown(values['model'])} is not served here; the model is {limits.model_name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    try:
        body = kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise _request_error(error, kind, limits) from error
    for name, (lowest, highest) in _whole_ranges(limits).items():
        value = getattr(body, name, None)
        if value is not None and not lowest <= value <= highest:
            raise RequestError(f"{name} is {shown(value)}; it must be {_expected(name, limits)}", param=name)
    return body


def _whole_ranges(limits: Limits) -> dict[str, tuple[int, int]]:
    return {
        "max_tokens": (1, limits.max_tokens),
        "max_completion_tokens": (1, limits.max_tokens),
        "top_k": (0, limits.vocab_size),
        "n": (1, limits.max_texts),
        "seed": (-(2**63), 2**63 - limits.max_texts),
    }


def _expected(name: str, limits: Limits) -> str:
    ranges = _whole_ranges(limits)
    if name in ranges:
        lowest, highest = ranges[name]
        return f"a whole number from {lowest} to {highest}"
    numbers = {"temperature": f"a number from 0 to {_MAX_TEMPERATURE:g}", "top_p": "a number above 0 and at most 1"}
    return numbers.get(name, "true or false")


def _read_json(content: bytes) -> dict[str, Any]:
    """json.loads, as pydantic's own reader refuses half a surrogate pair and lets NaN pass."""
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {shown(str(error), 200)}") from error
    if not isinstance(values, dict):
        raise RequestError("the body is not a JSON object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_unknown(values: dict[str, Any], kind: type[Body]) -> None:
    for name, value in values.items():
        if name in kind.model_fields:
            continue
        if name not in kind.neutral:
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"unknown field {shown(name)}{hint}", param=name[:100])
        if not any(type(value) is type(neutral) and value == neutral for neutral in kind.neutral[name]):
            raise RequestError(f"{name} is not supported by this server; leave it out", param=name)


def _request_error(error: ValidationError, body: type[Body], limits: Limits) -> RequestError:
    """The first thing that is wrong with a request, in a sentence."""
    errors = error.errors(include_url=False)
    first = errors[0]
    name, kind = str(first["loc"][0]), first["type"]
    asked, needed, expected = body.asked
    if kind == "missing":
        message = f"{asked} is missing; {needed}"
    elif name == asked:
        message = f"{asked} must be {expected}"
    elif name == "stop" and any(entry["type"].startswith("string_too") for entry in errors):
        message = f"a text of stop must have 1 to {_MAX_STOP_CHARACTERS} characters"
    elif name == "stop":
        message = f"stop must be a text or a list of at most {_MAX_STOPS} texts"
    elif name == "stream_options" and kind != "bool_type":
        message = "stream_options may hold include_usage only"
    else:
        name = str(first["loc"][-1])
        message = f"{name} is {shown(first['input'])}; it must be {_expected(name, limits)}"
    return RequestError(message, param=name)


def _encode(prompt: str | list[int], limits: Limits, tokenizer: Tokenizer) -> list[int]:
    most = limits.max_prompt_tokens
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
            f"the prompt has the id {shown(wrong[0])}; ids are below {tokenizer.vocab_size}", param="prompt"
        )
    return prompt


def shown(value: Any, most: int = 60) -> str:
    """A value of a request, short enough for a sentence."""
    text = value if isinstance(value, str) and most > 60 else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
