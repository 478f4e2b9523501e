"""The content of a tokenizer: its tokens, merges and special tokens, and whether they fit together."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pipeline.tokenizer.patterns import MAX_TOKENS, Pattern


class Vocabulary(NamedTuple):
    """Bytes of every id (none for an id without a token), pairs of ids to merge in order, special tokens, pattern."""

    tokens: list[bytes]
    merges: list[tuple[int, int]]
    special_tokens: dict[str, int]
    pattern: Pattern = "gpt2"


def check_vocabulary(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids of the 256 bytes, and the id that every merge produces; ValueError where the parts do not fit together."""
    tokens, merges, special_tokens, _ = vocabulary
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"has {len(tokens)} tokens, more than {MAX_TOKENS}")
    special_ids = set(special_tokens.values())
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    num_tokens = len(tokens) - tokens.count(b"")  # the rest are ids without a token
    ids.pop(b"", None)
    for name, token_id in special_tokens.items():
        is_there = name and 0 <= token_id < len(tokens) and tokens[token_id] == name.encode()
        if not is_there or (len(ids) != num_tokens and tokens.count(name.encode()) > 1):
            raise ValueError(f"has the special token {name!r} that is empty, an ordinary token too, or not at its id")
    if len(ids) != num_tokens or len(special_ids) != len(special_tokens):
        raise ValueError("gives the same bytes two ids, or two special tokens the same id")
    for token_id in special_ids:
        del ids[tokens[token_id]]
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(f"has no token for the byte {missing[0]}")
    merged_ids = [ids.get(tokens[left] + tokens[right]) for left, right in merges]
    if None in merged_ids or not special_ids.isdisjoint(itertools.chain.from_iterable(merges)):
        left, right = next(
            pair for pair, merged in zip(merges, merged_ids, strict=True) if merged is None or special_ids & {*pair}
        )
        raise ValueError(f"merges {tokens[left]!r} and {tokens[right]!r} to something that is not in its vocabulary")
    if len(set(merges)) != len(merges):
        raise ValueError("lists a merge twice")
    return [ids[bytes([byte])] for byte in range(256)], [merged for merged in merged_ids if merged is not None]
