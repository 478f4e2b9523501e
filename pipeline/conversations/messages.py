"""What a conversation is: messages of a system (first, if there is one), then of a user and an assistant in turn.

Everything else is a RecordError, whose reason is what such conversations are counted under.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from pipeline.conversations.templates import ROLES, Message
from pipeline.sources.work_items import RecordError

NO_MESSAGES, WRONG_ROLE, WRONG_ORDER, EMPTY, TOO_LONG = (
    *("not messages", "wrong role", "wrong order", "empty", "too long"),
)
_SHOWN = 40


def checked(value: Any) -> list[Message]:
    """The messages of a conversation, if it is one that a model can learn from.

    Raises:
        RecordError: no list of messages, a role that is not known, messages in another order than told above or without
            an answer at the end, a message of nothing but white space. The message goes on after the record's place.
    """
    if not isinstance(value, list) or not all(map(_is_message, value)):
        raise RecordError("holds no list of messages, each with the texts role and content", NO_MESSAGES)
    if not value:
        raise RecordError("is a conversation without a message", EMPTY)
    messages: list[Message] = [{"role": each["role"], "content": each["content"]} for each in value]
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ROLES:
            raise RecordError(f"has a message of {role[:_SHOWN]!r}; known are {', '.join(ROLES)}", WRONG_ROLE)
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            raise RecordError(f"has an empty message (number {number}, of {message['role']})", EMPTY)
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        order = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise RecordError(f"has messages in the order {order}; user and assistant take turns", WRONG_ORDER)
    return messages


def is_held_out(messages: list[Message], val_fraction: float) -> bool:
    """Whether a conversation is one for validation: a hash of its messages decides, as of documents."""
    content = [[message["role"], message["content"].strip()] for message in messages]
    return xxhash.xxh3_64_intdigest(json.dumps(content).encode()) < int(val_fraction * 2**64)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
