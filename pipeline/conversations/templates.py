"""Chat templates: how the messages of a conversation become token ids, and which of them the model learns to say.

A template is chosen by its name. Its special tokens take the ids behind those of the tokenizer, which are the padded
rows of the embedding as long as there are any (50,257 of GPT-2's 50,304). Text never becomes one of them: a message
that holds "<|im_end|>" is encoded as ordinary characters. The same template is stored in the form of transformers,
with marks around what the model says, so that apply_chat_template renders the same text.

White space around a message is left out. So no token reaches over the border between a message and what the template
puts around it, and a rendered conversation has the ids that a tokenizer gives to its whole text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.bpe import Tokenizer

Message: TypeAlias = Mapping[str, str]
"""{"role": one of ROLES, "content": text}."""
TemplateName: TypeAlias = Literal["chatml", "gpt2.5"]

ROLES = ("system", "user", "assistant")
TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers looks for a template, beside tokenizer.json."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What stands around the messages of a conversation."""

    name: TemplateName
    special_tokens: tuple[str, ...]
    """The tokens that it needs, in the order of their ids."""
    begin: str
    """Before each message; {role} stands for its role."""
    end: str | None
    """The special token behind each message; None: the one between documents, <|endoftext|>."""
    after: str
    """Text behind that token."""
    learns_after: bool
    """Whether the model learns to say that text, too, behind its own messages."""
    jinja: str
    """The same for transformers (chat_template)."""


CHATML = ChatTemplate(
    name="chatml",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    begin="<|im_start|>{role}\n",
    end="<|im_end|>",
    after="\n",
    learns_after=False,
    jinja=(
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        "{%- generation %}{{- message['content'] | trim + '<|im_end|>' }}{%- endgeneration %}"
        "{%- else %}{{- message['content'] | trim + '<|im_end|>' }}"
        "{%- endif %}"
        "{{- '\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
)
"""ChatML, as many models of others have it."""
GPT25 = ChatTemplate(
    name="gpt2.5",
    special_tokens=("<|user|>", "<|assistant|>", "<|system|>"),
    begin="<|{role}|>\n",
    end=None,
    after="\n",
    learns_after=True,
    jinja=(
        "{%- for message in messages %}"
        "{{- '<|' + message['role'] + '|>\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        "{%- generation %}{{- message['content'] | trim + eos_token + '\\n' }}{%- endgeneration %}"
        "{%- else %}{{- message['content'] | trim + eos_token + '\\n' }}"
        "{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
    ),
)
"""That of the author of GPT-2.5, as in the published itskoma/MyGPT: ids 50,257 to 50,259."""
TEMPLATES: dict[str, ChatTemplate] = {template.name: template for template in (CHATML, GPT25)}


def with_chat_tokens(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer with the special tokens of a template, those that it lacks, behind its last id.

    Raises:
        UserError: the vocabulary is as large as it can be.
    """
    return tokenizer.with_special_tokens(TEMPLATES[name].special_tokens)


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """The token ids of a conversation (N,), and which of them the model learns to say (N,) bool."""

    ids: npt.NDArray[Any]
    learned: npt.NDArray[np.bool_]


class Chat:
    """A template and the tokenizer that has its tokens: from messages to ids.

    Args:
        tokenizer: as ``with_chat_tokens`` returns it.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.end_id = tokenizer.eot_id if template.end is None else tokenizer.special_tokens[template.end]
        """The token that ends each message: where the answer of a model is complete."""
        self._begins = {role: self._fixed(template.begin.format(role=role)) for role in ROLES}
        self._end = np.array([self.end_id], tokenizer.id_dtype)
        self._after = self._fixed(template.after)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation.

        Args:
            messages: with a role of ROLES each; their order is not looked at (messages.py does).
            add_generation_prompt: add what an answer of the assistant begins with.
        """
        (encoded,) = self.encode([messages])
        prompt = self._begins["assistant"].tolist() if add_generation_prompt else []
        return [*encoded.ids.tolist(), *prompt]

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[EncodedConversation]:
        """The conversations as ids; learned are the contents of the assistant's messages, and what ends them."""
        texts = [message["content"].strip() for messages in conversations for message in messages]
        ids, offsets = self.tokenizer.encode_batch(texts)
        found, number = [], 0
        for messages in conversations:
            parts: list[npt.NDArray[Any]] = []
            learned: list[tuple[int, bool]] = []  # lengths of runs, and whether they are learned
            for message in messages:
                content = ids[offsets[number] : offsets[number + 1]]
                begin, is_answer = self._begins[message["role"]], message["role"] == "assistant"
                parts += [begin, content, self._end, self._after]
                learned += [
                    (len(begin), False),
                    (len(content) + 1, is_answer),
                    (len(self._after), is_answer and self.template.learns_after),
                ]
                number += 1
            lengths, values = zip(*learned, strict=True) if learned else ((), ())
            found.append(
                EncodedConversation(
                    ids=np.concatenate(parts) if parts else ids[:0], learned=np.repeat(np.array(values, bool), lengths)
                )
            )
        return found

    def _fixed(self, text: str) -> npt.NDArray[Any]:
        ids = self.tokenizer.encode(text, allowed_special=self.template.special_tokens)
        return np.array(ids, self.tokenizer.id_dtype)


def chat_of(name: str, tokenizer: Tokenizer) -> Chat:
    """The chat of a template by its name; ``tokenizer`` has its tokens."""
    return Chat(TEMPLATES[name], tokenizer)
