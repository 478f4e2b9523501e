"""Independent references for the tokenizer's tests: tiktoken, a slow splitter, a naive trainer; texts that hurt."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence

import pyarrow.parquet as pq
import tiktoken

from pipeline.bpe import Tokenizer
from tests.conftest import shared_folder

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

NASTY = [
    *"aZsé ñстß漢字١½²Ⅷ09'’\"!.-_$€´`<|>\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f\x85\xa0\u1680\u180e\u2003\u2028\u200b",
    *"\u200d\u202f\u205f\u3000\ufeff\ufffd\u0301\u0e33\u0f0b\U0001f600\U0001f3fd\U00013460\U000323b0\U0010ffff",
    *[
        " ",
        "  ",
        "\r\n",
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "'S",
        "'LL",
        "n't",
        "the",
        " the",
        "<|endoftext|>",
    ],
]


@functools.cache
def gpt2() -> Tokenizer:
    """Our tokenizer with GPT-2's vocabulary; skips the test where that is absent."""
    folder = shared_folder("gpt2")
    return Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")


@functools.cache
def gpt2_tiktoken() -> tiktoken.Encoding:
    """tiktoken with GPT-2's vocabulary, read without any of our code."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    vocab = json.loads((shared_folder("gpt2") / "vocab.json").read_text(encoding="utf-8"))
    special = {"<|endoftext|>": vocab.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def as_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the vocabulary of a tokenizer that was trained here, whose ids are ranks."""
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    ranks = {tokenizer.decode_bytes([i]): i for i in ordinary}
    return tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )


def documents(number: int) -> list[str]:
    """The first documents of the corpus."""
    rows = next(pq.ParquetFile(shared_folder("corpus") / "part-000.parquet").iter_batches(number, columns=["text"]))
    return [str(text) for text in rows.column("text").to_pylist()]


@functools.cache
def tiktoken_class(pattern: str) -> frozenset[str]:
    """All characters that tiktoken counts to a class such as \\p{L}."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return frozenset(bytes(encoding.encode_ordinary(characters)).decode())


@functools.cache
def stand_ins() -> dict[int, str]:
    """For str.translate: every character of a class -> one ASCII character, those that the pattern names excepted."""
    table = {ord(letter): "a" for letter in tiktoken_class(r"\p{L}")} | {ord(letter): letter for letter in "stdmlvre"}
    table |= {ord(number): "1" for number in tiktoken_class(r"\p{N}")}
    return table | {ord(space): "\t" for space in tiktoken_class(r"\s")} | {0x20: " ", 0x27: "'"}


def pieces(data: bytes) -> list[bytes]:
    """What GPT-2's pattern cuts bytes into; a bad byte is a lone surrogate, which is in no class.

    The pattern is applied by Python's re to stand-ins, of which there are few, one for each character.
    """
    text = data.decode("utf-8", "surrogateescape")
    known = stand_ins()
    shown = "".join([known.get(ord(character), "!") for character in text])
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-z]+| ?1+| ?[!']+|[ \t]+(?![^ \t])|[ \t]+"
    spans = [match.span() for match in re.finditer(pattern, shown)]
    return [text[start:stop].encode("utf-8", "surrogateescape") for start, stop in spans]


def naive_merges(texts: Sequence[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    """BPE training as it is defined: count all pairs, merge the best one everywhere, begin again."""
    words = Counter(piece for text in texts for piece in pieces(text.encode()))
    tokens_of = {word: [bytes([byte]) for byte in word] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, tokens in tokens_of.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens_of = {word: _merged(tokens, best) for word, tokens in tokens_of.items()}
    return merges


def _merged(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    index = 0
    while index < len(tokens):
        width = 2 if tuple(tokens[index : index + 2]) == pair else 1
        result.append(b"".join(tokens[index : index + width]))
        index += width
    return result
