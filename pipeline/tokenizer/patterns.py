"""The pre-tokenization patterns that the tokenizer knows, and its largest vocabulary. Imports nothing of the project.

A configuration names a pattern and checks a vocabulary size without loading numba.
"""

from __future__ import annotations

from typing import Literal

Pattern = Literal["gpt2", "cl100k"]
PATTERNS: dict[Pattern, str] = {
    "gpt2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
}
"""Name -> the regular expression, as tiktoken and `tokenizers` take it."""

MAX_TOKENS = (1 << 20) - 1
"""Largest vocabulary size: two ids of 20 bits and a rank of 24 fit into one 64-bit word (kernels/merge_short.py)."""
