"""Our tokenizer as llama.cpp has it: tokens, their types, merges, and the name of the pre-tokenization pattern.

llama.cpp knows patterns by names only. Two of its names stand for cl100k's: llama-bpe, with which a pretoken that is a
token is taken whole, and dbrx, which merges always, as we do. The two differ only for a vocabulary with a token that
its own merges do not lead to; such a one is called dbrx.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import gguf

from pipeline.conversations.templates import Chat
from pipeline.errors import UserError
from pipeline.tokenizer.bpe import Tokenizer, pretokenize
from pipeline.tokenizer.patterns import Pattern

_NAMES: dict[Pattern, str] = {"gpt2": "gpt-2", "cl100k": "llama-bpe"}
_ALWAYS_MERGES = {"llama-bpe": "dbrx"}
_UNUSED = "[UNUSED_{}]"


def pattern_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name (tokenizer.ggml.pre) for how the tokenizer cuts text into pretokens.

    Raises:
        UserError: llama.cpp has no name for it.
    """
    name = _NAMES.get(tokenizer.pattern)
    if name is None:
        raise UserError(
            f"the tokenizer cuts text by the pattern {tokenizer.pattern}, for which llama.cpp has no name; a GGUF can "
            f"be made of models with the pattern {' or '.join(_NAMES)}"
        )
    return _ALWAYS_MERGES[name] if name in _ALWAYS_MERGES and _has_unreachable_tokens(tokenizer) else name


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, num_ids: int, chat: Chat | None) -> None:
    """Write down the tokenizer, what ends a text, and the template of a model that chats.

    Args:
        num_ids: rows of the embedding; those behind the tokenizer's ids are marked as unused.

    Raises:
        UserError: llama.cpp cannot have this tokenizer.
    """
    content = json.loads(tokenizer.to_json())
    if not content["model"]["merges"]:
        raise UserError("the tokenizer has no merges, and llama.cpp reads none without; give a larger --vocab_size")
    tokens, types = _tokens(content, num_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(content["model"]["merges"])
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if chat is not None:
        writer.add_eot_token_id(chat.end_id)
        writer.add_chat_template(plain_template(chat.template.jinja))


def plain_template(jinja: str) -> str:
    """A chat template without the marks around what the model says, which not every reader of a GGUF knows."""
    for mark in ("{%- generation %}", "{%- endgeneration %}"):
        jinja = jinja.replace(mark, "")
    return jinja


def _tokens(content: dict[str, Any], num_ids: int) -> tuple[list[str], list[int]]:
    """The text of every id, in GPT-2's byte characters, and its type."""
    tokens, types = [_UNUSED.format(number) for number in range(num_ids)], [int(gguf.TokenType.UNUSED)] * num_ids
    for text, token_id in content["model"]["vocab"].items():
        tokens[token_id], types[token_id] = text, int(gguf.TokenType.NORMAL)
    for entry in content["added_tokens"]:
        types[entry["id"]] = int(gguf.TokenType.CONTROL)
    twice, count = Counter(tokens).most_common(1)[0]
    if count > 1:  # llama.cpp would end the process
        raise UserError(f"the tokenizer has two tokens that a GGUF writes as {twice!r}; give it another special token")
    return tokens, types


def _has_unreachable_tokens(tokenizer: Tokenizer) -> bool:
    """Whether some pretoken is a token, but its merges lead to others."""
    special = set(tokenizer.special_tokens.values())
    for token_id in range(tokenizer.vocab_size):
        if token_id in special or token_id in tokenizer.holes:
            continue
        data = tokenizer.decode_bytes([token_id])
        if tokenizer.encode_bytes(data) != [token_id] and pretokenize(data, tokenizer.pattern) == [data]:
            return True
    return False
