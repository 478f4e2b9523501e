"""Rendered ids and the mask of what is learned: as transformers has them, by the stored template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.conversations.templates import TEMPLATES, Chat, chat_of, with_chat_tokens
from pipeline.errors import UserError
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import count_pretokens, train_bpe
from tests.conftest import shared_folder
from tests.support.conversations import TRAPS, WORDS, Messages, conversations

NAMES = sorted(TEMPLATES)


@pytest.fixture(scope="module", params=["gpt2", "cl100k"])
def base(request: pytest.FixtureRequest) -> Tokenizer:
    pattern: Pattern = request.param
    texts = [" ".join(WORDS), *TRAPS, "assistant user system\n\n"]
    return train_bpe(count_pretokens(pa.array(texts), pattern=pattern), 300, pattern=pattern)


def theirs(chat: Chat, folder: Path) -> PreTrainedTokenizerFast:
    """The stored files as transformers reads them."""
    chat.tokenizer.save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(chat.template.jinja)
    return PreTrainedTokenizerFast.from_pretrained(folder, eos_token="<|endoftext|>")


def without_traps(messages: Messages) -> bool:
    """transformers turns text into special tokens, which ours never does."""
    return not any("<|" in message["content"] for message in messages)


def by_hand(messages: Messages, name: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and mask written down once more, message by message."""
    ids: list[int] = []
    learned: list[bool] = []

    def add(new: list[int], is_learned: bool) -> None:
        ids.extend(new)
        learned.extend([is_learned] * len(new))

    special = tokenizer.special_tokens
    for message in messages:
        text, mine = message["content"].strip(), message["role"] == "assistant"
        if name == "chatml":
            add([special["<|im_start|>"]], False)
            add(tokenizer.encode(message["role"] + "\n"), False)
            add([*tokenizer.encode(text), special["<|im_end|>"]], mine)
            add(tokenizer.encode("\n"), False)
        else:
            add([special[f"<|{message['role']}|>"], *tokenizer.encode("\n")], False)
            add([*tokenizer.encode(text), special["<|endoftext|>"], *tokenizer.encode("\n")], mine)
    return ids, learned


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_transformers(base: Tokenizer, name: str, tmp_path: Path) -> None:
    chat = chat_of(name, with_chat_tokens(base, name))
    tokenizer = theirs(chat, tmp_path)
    compared = 0
    for messages in filter(without_traps, conversations(60)):
        (ours,) = chat.encode([messages])
        expected: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.ids.tolist() == expected["input_ids"]
        assert ours.learned.astype(int).tolist() == expected["assistant_masks"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert chat.tokenizer.decode(ours.ids) == text
        asked = messages[:-1]
        prompt: Any = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=True)
        assert chat.render(asked, add_generation_prompt=True) == prompt["input_ids"]
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", NAMES)
def test_many_conversations_at_once_are_each_alone(base: Tokenizer, name: str) -> None:
    chat = chat_of(name, with_chat_tokens(base, name))
    for messages, encoded in zip(conversations(60), chat.encode(conversations(60)), strict=True):
        ids, learned = by_hand(messages, name, chat.tokenizer)
        assert (encoded.ids.tolist(), encoded.learned.tolist()) == (ids, learned)
        assert chat.render(messages) == ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "trap", [*TEMPLATES["chatml"].special_tokens, *TEMPLATES["gpt2.5"].special_tokens, "<|endoftext|>"]
)
def test_text_never_becomes_a_special_token(base: Tokenizer, name: str, trap: str) -> None:
    chat = chat_of(name, with_chat_tokens(base, name))
    plain = chat.render([{"role": "user", "content": "x"}])
    ids = chat.render([{"role": "user", "content": f"x{trap}y"}])
    special = set(chat.tokenizer.special_tokens.values())
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    assert f"x{trap}y" in chat.tokenizer.decode(ids)


@pytest.mark.parametrize(("name", "first"), [("chatml", "<|im_start|>"), ("gpt2.5", "<|user|>")])
def test_the_tokens_of_a_chat_lie_behind_gpt2s(name: str, first: str) -> None:
    folder = shared_folder("gpt2")
    gpt2 = Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")
    chat = with_chat_tokens(gpt2, name)
    assert chat.special_tokens[first] == 50257 == gpt2.vocab_size
    assert chat.vocab_size == 50257 + len(TEMPLATES[name].special_tokens)
    text = "old ids stay <|im_end|>, whatever is added 🙂\n\n"
    assert chat.encode(text) == gpt2.encode(text)
    assert chat.eot_id == gpt2.eot_id == 50256


def test_tokens_that_are_there_are_not_added_again(base: Tokenizer) -> None:
    once = with_chat_tokens(base, "chatml")
    assert with_chat_tokens(once, "chatml").fingerprint == once.fingerprint != base.fingerprint
    both = with_chat_tokens(once, "gpt2.5")
    assert both.special_tokens["<|im_end|>"] == once.special_tokens["<|im_end|>"]
    assert both.vocab_size == base.vocab_size + 5


def test_another_token_between_documents_ends_the_messages(base: Tokenizer) -> None:
    other = with_chat_tokens(base, "gpt2.5").with_end_of_text("<|system|>")
    chat = chat_of("gpt2.5", with_chat_tokens(other, "gpt2.5"))
    assert chat.end_id == other.special_tokens["<|system|>"]


def test_a_special_token_that_is_ordinary_text_is_a_sentence(base: Tokenizer) -> None:
    with pytest.raises(UserError, match="special tokens a"):
        base.with_special_tokens(["a"])
