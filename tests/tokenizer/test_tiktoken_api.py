"""What tiktoken's users look for: special tokens by name or all, iterables, counts, files with holes in their ids."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.dataset.token_counts import byte_lengths
from pipeline.errors import UserError
from pipeline.tokenizer import special_tokens
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import Pattern
from tests.support.bpe_references import BOTH, EXPRESSIONS, NASTY, documents, gpt2, gpt2_tiktoken

END = "<|endoftext|>"
SPECIAL = {"<|a|>": 300, "<|a|><|b|>": 301, "end of": 302, END: 310}
MERGES = [(97, 98), (256, 99), (32, 97)]
TOKENS = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc", b" a"]


@functools.cache
def with_holes(pattern: Pattern = "gpt2") -> Tokenizer:
    """Merges up to id 258, special tokens from 300 on: no token has the ids 259 to 299 and 303 to 309."""
    tokens = TOKENS + [b""] * (311 - len(TOKENS))
    for name, token_id in SPECIAL.items():
        tokens[token_id] = name.encode()
    return Tokenizer(tokens, MERGES, SPECIAL, pattern=pattern)


@functools.cache
def tiktoken_with_holes(pattern: Pattern = "gpt2") -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    return tiktoken.Encoding("holes", pat_str=EXPRESSIONS[pattern], mergeable_ranks=ranks, special_tokens=SPECIAL)


texts = st.lists(st.sampled_from([*NASTY, *SPECIAL, "ab", " abc", "end", " of", "<|a|>", "\n", " "]), max_size=30)


# ---- special tokens --------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(text=texts.map("".join), allowed=st.one_of(st.just("all"), st.sets(st.sampled_from(sorted(SPECIAL)))))
@example(text=f"ab{END}abc <|a|><|b|>", allowed="all")
def test_allowed_special_tokens_as_in_tiktoken(text: str, allowed: Any) -> None:
    """The longest first; tiktoken takes the first listed of two that begin in one place, so the longest is listed."""
    theirs = tiktoken_with_holes()
    if "<|a|><|b|>" in text and (allowed == "all" or {"<|a|>", "<|a|><|b|>"} <= set(allowed)):
        return  # tiktoken's choice depends on the order of a hash set
    expected = theirs.encode(text, allowed_special=allowed, disallowed_special=())
    assert with_holes().encode(text, allowed_special=allowed) == expected
    assert with_holes().count(text, allowed_special=allowed) == len(expected)


def test_the_longest_of_two_special_tokens() -> None:
    assert with_holes().encode("<|a|><|b|><|a|>", "all") == [301, 300]


def functions() -> list[Callable[..., Any]]:
    """All that take allowed_special and disallowed_special."""
    tokenizer = with_holes()
    return [
        tokenizer.encode,
        tokenizer.count,
        lambda text, *a, **options: list(tokenizer.encode_iterable([text], *a, **options)),
    ]


@given(text=texts.map("".join))
@example(text=f"ab{END}")
def test_disallowed_special_tokens_as_in_tiktoken(text: str) -> None:
    choices: list[tuple[Any, Any]] = [((), "all"), ({END}, "all"), ({END}, {"<|a|>"}), ((), {"end of", END})]
    for allowed, disallowed in choices:
        try:
            theirs = tiktoken_with_holes().encode(text, allowed_special=set(allowed), disallowed_special=disallowed)
        except ValueError:
            for function in functions():
                with pytest.raises(UserError, match="the text holds the special token"):
                    function(text, allowed, disallowed)
            continue
        assert with_holes().encode(text, allowed, disallowed) == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allowed_special": {"<|none|>"}}, r"allowed_special names '<\|none\|>', but the special tokens are"),
        ({"disallowed_special": ["<|none|>"]}, r"disallowed_special names '<\|none\|>'"),
        (
            {"allowed_special": END},
            r"allowed_special is the str '<\|endoftext\|>'; give a set of special tokens, or all",
        ),
        ({"allowed_special": "all", "disallowed_special": {END}}, "is in allowed_special and in disallowed_special"),
    ],
)
def test_mistakes_in_the_names(arguments: dict[str, Any], message: str) -> None:
    for function in functions():
        with pytest.raises(UserError, match=message):
            function("text", **arguments)


# ---- iterables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", BOTH)
@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(texts.map("".join), max_size=12), part_chars=st.integers(1, 30), allowed=st.sampled_from([(), "all"])
)
def test_an_iterable_has_the_ids_of_its_texts_joined(
    pattern: Pattern, parts: list[str], part_chars: int, allowed: Any
) -> None:
    tokenizer = with_holes(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(special_tokens, "_PART_CHARS", part_chars)
        found = list(tokenizer.encode_iterable(parts, allowed))
    assert found == tokenizer.encode("".join(parts), allowed)


def test_the_lines_of_a_file_have_the_ids_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special_tokens, "_PART_CHARS", 1000)
    (tmp_path / "a.txt").write_text(f"\n{END}\n\n".join(documents(200)), encoding="utf-8")
    with (tmp_path / "a.txt").open(encoding="utf-8") as file:
        found = list(gpt2().encode_iterable(file, {END}))
    whole = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert found == gpt2_tiktoken().encode(whole, allowed_special={END}) and gpt2().decode(found) == whole


def test_an_iterable_is_read_as_its_ids_are_taken() -> None:
    read = 0

    def lines() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "some words in a line of text\n" * 10

    ids = with_holes().encode_iterable(lines())
    next(ids)
    assert 0 < read * 290 < 3 * special_tokens._PART_CHARS


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    texts = ["", "naïve 漢字 ab", *documents(50)]
    expected = [len(ids) for ids in gpt2_tiktoken().encode_ordinary_batch(texts)]
    assert [gpt2().count(text) for text in texts] == expected
    for given_texts in (texts, pa.array(texts, pa.large_string())):
        counts = gpt2().count_batch(given_texts, num_threads=2)
        assert counts.dtype == np.int64 and counts.tolist() == expected


# ---- holes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", BOTH)
def test_a_file_with_holes_is_written_and_read(tmp_path: Path, pattern: Pattern) -> None:
    tokenizer = with_holes(pattern)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint and again.to_json() == tokenizer.to_json()
    assert (again.vocab_size, again.eot_id, again.special_tokens) == (311, 310, SPECIAL)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (f"abc ab{END}", "the end of <|a|>x"):
        assert again.encode(text, "all") == theirs.encode(text).ids
        assert again.decode(again.encode(text, "all")) == text


def test_ids_without_a_token() -> None:
    tokenizer = with_holes()
    with pytest.raises(UserError, match="the id 259 cannot be decoded; the tokenizer has no token with this id"):
        tokenizer.decode([97, 303, 259])
    with pytest.raises(UserError, match="no token with the id 305"):
        tokenizer.with_eot_id(305)
    lengths = byte_lengths(tokenizer)
    assert lengths[[97, 256, 257, 259, 300, 305, 310]].tolist() == [1, 2, 3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vocab: vocab.update(a=98), "gives the token 'b' the id 98"),
        (lambda vocab: vocab.update(a=-1), "gives the token 'a' the id -1"),
        (lambda vocab: vocab.update(a=[1]), "the id"),
        (lambda vocab: vocab.update(a=10**9), "the id 1000000000; its 263 tokens must have ids of their own"),
        (lambda vocab: vocab.pop("a"), "merges 'a', which is not in its vocabulary"),
    ],
)
def test_ids_that_cannot_be(tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    content = json.loads(with_holes().to_json())
    damage(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


# ---- the token between documents -------------------------------------------------------------------------------------


def test_another_token_between_documents() -> None:
    tokenizer = with_holes()
    other = tokenizer.with_end_of_text("<|a|>")
    assert (tokenizer.end_of_text, tokenizer.eot_id) == (END, 310)
    assert (other.end_of_text, other.eot_id, other.fingerprint) == ("<|a|>", 300, tokenizer.fingerprint)
    assert other.encode("ab") == tokenizer.encode("ab") == [256]
    with pytest.raises(UserError, match=r"no special token '</s>', but \['<\|a\|>'"):
        tokenizer.with_end_of_text("</s>")
    with pytest.raises(UserError, match="name the one between documents with --end_of_text_token"):
        Tokenizer(TOKENS, MERGES, {}).eot_id  # noqa: B018
