"""OpenAI's chat protocol: messages become one prompt by the model's template, answers get its JSON form.

The rest of a request, its checks and its limits are those of completions (openai_protocol.py). What is in a message is
text: it never becomes a token of the chat. Messages that the model was never shown, such as two of the user in a row,
are refused, and so are those that leave no room for an answer.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from pipeline.conversations.templates import Chat, Message
from pipeline.serving.openai_protocol import (
    Answer,
    Body,
    Completion,
    Limits,
    RequestError,
    completion_of,
    read_body,
    shown,
)

_ANSWER_SHARE = 4
"""At least 1 / _ANSWER_SHARE of the context is kept for an answer, unless fewer tokens are asked for."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _ChatBody(Body):
    """The fields of a chat's request."""

    neutral = Body.neutral | {
        **{"top_logprobs": (None,), "response_format": (None, {"type": "text"}), "modalities": (None, ["text"])},
        **{
            "tools": (None, []),
            "tool_choice": (None, "none"),
            "functions": (None, []),
            "function_call": (None, "none"),
        },
        **{"store": (None, False), "service_tier": (None, "auto", "default")},
    }
    asked = (
        *("messages", "give a list of messages, each with role and content"),
        "a list of messages, each with role and content",
    )

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    metadata: Any = None


class ChatAnswer(Answer):
    """The JSON of one answer in a chat, whole or chunk by chunk."""

    id_prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def first_chunks(self) -> list[dict[str, Any]]:
        """Who speaks, for each choice."""
        count = len(self._completion.requests)
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index, **delta}]) for index in range(count)]

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def parse(content: bytes, limits: Limits, chat: Chat | None) -> Completion:
    """The request for an answer in a body; RequestError with a sentence about what is wrong with it."""
    if chat is None:
        raise RequestError(
            f"the model {limits.model_name!r} has no chat template; use /v1/completions, or a model that "
            "jobs/finetune.py made"
        )
    body = read_body(content, _ChatBody, limits)
    asked = _asked_tokens(body)
    ids = chat.render(_checked(body.messages), add_generation_prompt=True)
    length = limits.context_length
    room = min(asked or length, max(1, length // _ANSWER_SHARE))
    if len(ids) > (most := min(limits.max_prompt_tokens, length - room)):
        message = f"the messages have {len(ids):,} tokens, and there is room for {most:,}; leave out the oldest"
        raise RequestError(f"{message}, or shorten them", param="messages", code="context_length_exceeded")
    max_tokens = min(asked or limits.max_tokens, length - len(ids))  # what was said is never forgotten for an answer
    return completion_of(body, [ids], [""], max_tokens=max_tokens, stop_id=chat.end_id)


def _asked_tokens(body: _ChatBody) -> int | None:
    """How many tokens an answer may have; OpenAI has two names for it."""
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return newer if newer is not None else older


def _checked(values: list[dict[str, Any]]) -> list[Message]:
    """The messages, if they are one of the system, or none, and then of user and assistant in turn, the user's last."""
    messages = [_message(number, value) for number, value in enumerate(values)]
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    expected = [("user", "assistant")[number % 2] for number in range(len(turns))]
    if not turns or len(turns) % 2 == 0 or [message["role"] for message in turns] != expected:
        raise RequestError(
            "messages must be one of the system, if there is one, then of user and assistant in turn, the last of the "
            f"user; they are of {_roles(messages)}",
            param="messages",
        )
    return messages


def _roles(messages: list[Message]) -> str:
    roles = [message["role"] for message in messages]
    return ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")


def _message(number: int, value: dict[str, Any]) -> Message:
    where = f"messages[{number}]"
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(where, f"has the role {shown(role)}; known are {', '.join(_ROLES)}")
    for name, other in value.items():
        if name not in ("role", "content") and other is not None and other != []:  # openai's own answers have such
            raise _wrong(where, f"has {shown(name)}, which is not supported by this server; leave it out")
    text = _text(where, value.get("content"))
    if not text.strip() and role != "assistant":
        raise _wrong(where, "is empty; write something")
    return {"role": _ROLES[role], "content": text}


def _text(where: str, content: Any) -> str:
    """The text of a message: a string, or the strings of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong(where, "must have a text as content")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, "has a part that is no text; this server reads text only")
    return "".join(part["text"] for part in content)


def _wrong(where: str, what: str) -> RequestError:
    return RequestError(f"{where} {what}", param="messages")
