"""Independent references for the tokenizer's tests: tiktoken, `tokenizers`, a slow splitter, a naive trainer; nasty
text.

What the libraries do beyond the letter of the patterns, found by trying every code point (tiktoken 0.14, `tokenizers`
0.23; both agree on all of it):

- their letters, numbers and white space are the same 141,028, 1,911 and 25 characters;
- (?i:'s) also takes U+017F, the long s; no other character is equal to a letter of a contraction without its case;
- the last newline of a run of white space ends a pretoken, at the end of a text too: "\\n " is two pretokens. So it is
  with the pattern of cl100k as Llama 3 has it; the cl100k_base inside tiktoken 0.14 makes one pretoken of it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence

import pyarrow.parquet as pq
import tiktoken
import tokenizers

from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.files import read_gpt2
from pipeline.tokenizer.patterns import Pattern
from tests.conftest import shared_folder

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS: dict[Pattern, str] = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN}
BOTH: list[Pattern] = ["gpt2", "cl100k"]

WORDS = " @  @\r\n@\n\n@'s@'t@'re@'ve@'m@'ll@'d@'S@'LL@'Re@'\u017f@\u017f@n't@the@ the@12@1984@<|endoftext|>"
NASTY = [
    *"aZsé ñстß漢字١½²Ⅷ09'’\"!.-_$€´`<|>\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f\x85\xa0\u1680\u180e\u2003\u2028\u200b",
    *"\u200d\u202f\u205f\u3000\ufeff\ufffd\u0301\u0e33\u0f0b\U0001f600\U0001f3fd\U00013460\U000323b0\U0010ffff",
    *WORDS.split("@"),
]
# Characters cut short, without their beginning, overlong, surrogates, beyond Unicode.
BAD_BYTES = [
    *[b"\xff", b"\x80", b"\xc3", b"\xe2", b"\xe2\x80", b"\xf0\x9f", b"\xf0\x9f\x98"],
    *[b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf5"],
]


@functools.cache
def gpt2(pattern: Pattern = "gpt2") -> Tokenizer:
    """Our tokenizer with GPT-2's vocabulary, cutting by a pattern; skips the test where the vocabulary is absent."""
    folder = shared_folder("gpt2")
    if pattern == "gpt2":
        return Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")
    vocabulary = read_gpt2(folder / "vocab.json", folder / "merges.txt", "<|endoftext|>")
    return Tokenizer(vocabulary.tokens, vocabulary.merges, vocabulary.special_tokens, pattern=pattern)


@functools.cache
def gpt2_tiktoken(pattern: Pattern = "gpt2") -> tiktoken.Encoding:
    """tiktoken with GPT-2's vocabulary, read without any of our code."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    vocab = json.loads((shared_folder("gpt2") / "vocab.json").read_text(encoding="utf-8"))
    special = {"<|endoftext|>": vocab.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}
    return tiktoken.Encoding(pattern, pat_str=EXPRESSIONS[pattern], mergeable_ranks=ranks, special_tokens=special)


@functools.cache
def gpt2_tokenizers(pattern: Pattern = "gpt2") -> tokenizers.Tokenizer:
    """`tokenizers` with GPT-2's vocabulary, read without any of our code; it knows no special token."""
    folder = shared_folder("gpt2")
    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(EXPRESSIONS[pattern]), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    theirs.pre_tokenizer = byte_level if pattern == "gpt2" else tokenizers.pre_tokenizers.Sequence([split, byte_level])
    return theirs


def as_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the vocabulary of a tokenizer that was trained here, whose ids are ranks."""
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    ranks = {tokenizer.decode_bytes([i]): i for i in ordinary}
    return tiktoken.Encoding(
        "ours", pat_str=EXPRESSIONS[tokenizer.pattern], mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )


def documents(number: int) -> list[str]:
    """The first documents of the corpus."""
    rows = next(pq.ParquetFile(shared_folder("corpus") / "part-000.parquet").iter_batches(number, columns=["text"]))
    return [str(text) for text in rows.column("text").to_pylist()]


def tiktoken_matches(expression: str, text: str) -> str:
    """All that tiktoken finds of a regular expression in a text, joined."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("matches", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    return bytes(encoding.encode_ordinary(text)).decode()


@functools.cache
def tiktoken_class(pattern: str) -> frozenset[str]:
    """All characters that tiktoken counts to a class such as \\p{L}."""
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return frozenset(tiktoken_matches(pattern, characters))


class StandIns(dict[int, str]):
    """For str.translate: every character -> the ASCII character that stands for its class, "!" for those of none.

    What a pattern names stays itself: the letters of the contractions, apostrophe, space and newlines.
    """

    def __missing__(self, code: int) -> str:
        return "!"


@functools.cache
def stand_ins(pattern: Pattern) -> StandIns:
    """The table for a pattern. cl100k does not look at case, and the lower case of the long s is s."""
    table = StandIns({ord(letter): "a" for letter in tiktoken_class(r"\p{L}")})
    table |= {ord(number): "1" for number in tiktoken_class(r"\p{N}")}
    table |= {ord(space): "\t" for space in tiktoken_class(r"\s")}
    table |= {ord(character): character for character in "stdmlvre '"}
    if pattern == "cl100k":
        table |= {ord(character): character.lower() for character in "STDMLVRE\r\n"} | {0x17F: "s"}
    return table


STAND_IN_PATTERNS: dict[Pattern, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-z]+| ?1+| ?[!']+|[ \t]+(?![^ \t])|[ \t]+",
    "cl100k": r"'s|'t|'re|'ve|'m|'ll|'d|[^\r\na-z1]?[a-z]+|1{1,3}| ?[!']+[\r\n]*|[ \t\r\n]*[\r\n]+"
    r"|[ \t\r\n]+(?![^ \t\r\n])|[ \t\r\n]+",
}


def pretokens(data: bytes, pattern: Pattern = "gpt2") -> list[bytes]:
    """What a pattern cuts bytes into; a bad byte is a lone surrogate, which is in no class.

    The pattern is applied by Python's re to stand-ins, of which there are few, one for each character.
    """
    text = data.decode("utf-8", "surrogateescape")
    shown = text.translate(stand_ins(pattern))
    spans = [match.span() for match in re.finditer(STAND_IN_PATTERNS[pattern], shown)]
    return [text[start:stop].encode("utf-8", "surrogateescape") for start, stop in spans]


def tiktoken_pretokens(texts: Sequence[str], expression: str) -> list[list[bytes]]:
    """What tiktoken cuts short texts into: with every part of every text in the vocabulary a pretoken is one token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for data in {text.encode() for text in texts}:
        for start, stop in itertools.combinations(range(len(data) + 1), 2):
            ranks.setdefault(data[start:stop], len(ranks))
    encoding = tiktoken.Encoding("pretokens", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_tokens_bytes(ids) for ids in encoding.encode_ordinary_batch(list(texts), num_threads=1)]


def tokenizers_pretokens(texts: Sequence[str], expression: str) -> list[list[bytes]]:
    """What `tokenizers` cuts texts into."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    return [[pretoken.encode() for pretoken, _ in split.pre_tokenize_str(text)] for text in texts]


def naive_ids(tokenizer: Tokenizer, pretoken: bytes) -> list[int]:
    """Encoding of one pretoken as it is defined: merge the leftmost pair of the lowest rank, begin again."""
    tokens, merges, _, _ = tokenizer._vocabulary
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = [id_of[bytes([byte])] for byte in pretoken]
    while True:
        found = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]
        if not found:
            return ids
        _, place = min(found)
        ids[place : place + 2] = [id_of[tokens[ids[place]] + tokens[ids[place + 1]]]]


def naive_merges(
    texts: Sequence[str], num_merges: int, pattern: Pattern = "gpt2", *, min_frequency: int = 1
) -> list[tuple[bytes, bytes]]:
    """BPE training as it is defined: count all pairs, merge the best one everywhere, begin again."""
    words = Counter(pretoken for text in texts for pretoken in pretokens(text.encode(), pattern))
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
        if pairs[best] < min_frequency:
            break
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
