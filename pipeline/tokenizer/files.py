"""Reading and writing of vocabularies: Hugging Face ``tokenizer.json`` and GPT-2's ``vocab.json`` with ``merges.txt``.

Both write bytes as printable characters, as GPT-2 does: the 188 printable bytes of Latin-1 as themselves, the other 68
as the characters from U+0100 on, in order. A setting under which another tokenizer would give other ids is refused by
name, never ignored.

How text is split into pretokens is part of the file: the pre-tokenizer ByteLevel splits by GPT-2's pattern, a Split
before it by the regular expression that it names. Two are known, GPT-2's and cl100k's, which is Llama-3's too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, AnyStr

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.folders import write_atomically
from pipeline.tokenizer.patterns import MAX_TOKENS, PATTERNS, Pattern
from pipeline.tokenizer.vocabulary import Vocabulary

# All spellings that are read: those of patterns.py and equal ones out of tiktoken. The cl100k_base of tiktoken 0.14 is
# not equal: it tries \s++$ first, so white space at the end of a text is one pretoken, which here ends after its last
# newline and begins again. In `tokenizers`, moreover, its \p{N}{1,3}+ takes any number of digits.
_SPELLINGS: dict[str, Pattern] = {expression: name for name, expression in PATTERNS.items()} | {
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""": "gpt2",
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|"""
    r"""\s*[\r\n]|\s+(?!\S)|\s+""": "cl100k",
}
_SHOWN_CHARACTERS = 120  # of a refused regular expression

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
# The same as tables of UTF-16, which are faster than str.translate by far.
_NO_BYTE = 256
_CODES = np.array([ord(BYTE_TO_CHARACTER[byte]) for byte in range(256)], "<u2")
_BYTES = np.full(1 << 16, _NO_BYTE, np.uint16)
_BYTES[_CODES] = np.arange(256)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which would scan hundreds of thousands of new tuples for cycles again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary of a byte-level BPE ``tokenizer.json``; UserError names whatever this project does not support."""
    return parse_tokenizer_json(_read_bytes(path), path)


@collector_paused()
def parse_tokenizer_json(content: bytes, path: Path | str) -> Vocabulary:
    """The vocabulary in the content of a ``tokenizer.json``; ``path`` is where it comes from, for error messages."""
    values = _parse_json(content, path)
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{path} has no model with a vocabulary; give a byte-level BPE tokenizer.json")
    pattern = _refuse_other_settings(path, values, model)
    special_tokens = _special_tokens(path, values.get("added_tokens") or [])
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{path} has no list of merges; give a byte-level BPE tokenizer.json")
    vocabulary = _vocabulary(path, model["vocab"], _pairs(path, merges), special_tokens)
    return vocabulary._replace(pattern=pattern)


@collector_paused()
def read_gpt2(vocab_json: Path, merges_txt: Path, end_of_text: str) -> Vocabulary:
    """The vocabulary of GPT-2's two files; the only special token is end_of_text, if the vocabulary has it."""
    vocab = _parse_json(_read_bytes(vocab_json), vocab_json)
    lines = _decode(_read_bytes(merges_txt), merges_txt).replace("\r\n", "\n").split("\n")
    merges = _pairs(merges_txt, [line for line in lines if line and not line.startswith("#version")])
    special_tokens = {end_of_text: vocab[end_of_text]} if end_of_text in vocab else {}
    return _vocabulary(vocab_json, vocab, merges, special_tokens)


def write_tokenizer_json(path: Path, vocabulary: Vocabulary) -> None:
    """Write ``tokenizer.json``: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [tokenizer_json(vocabulary).encode()])


@collector_paused()
def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The content of ``tokenizer.json``; the same for the same vocabulary."""
    shown = to_byte_characters(vocabulary.tokens)
    for name, token_id in vocabulary.special_tokens.items():
        shown[token_id] = name
    special_tokens = sorted(vocabulary.special_tokens.items(), key=lambda entry: entry[1])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": name, **flags, "special": True} for name, token_id in special_tokens
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(vocabulary.pattern),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {},
            "merges": [],
        },
    }
    # Filled in as text, a line each: with an indent, json takes half a second for them.
    quoted = [json.encoder.encode_basestring(token)[1:-1] for token in shown]
    vocab = ",\n".join([f'      "{token}": {token_id}' for token_id, token in enumerate(quoted) if token])
    merges = ",\n".join([f'      "{quoted[left]} {quoted[right]}"' for left, right in vocabulary.merges])
    text = json.dumps(content, ensure_ascii=False, indent=2)
    text = text.replace('"vocab": {}', f'"vocab": {{\n{vocab}\n    }}')
    text = text.replace('"merges": []', f'"merges": [\n{merges}\n    ]') if merges else text
    return text + "\n"


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The part that writes bytes as characters; with use_regex it splits text by GPT-2's pattern before."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pre_tokenizer(pattern: Pattern) -> dict[str, Any]:
    if pattern == "gpt2":
        return _byte_level(use_regex=True)
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def to_byte_characters(tokens: list[bytes]) -> list[str]:
    """Tokens in GPT-2's printable byte characters."""
    content = _CODES[np.frombuffer(b"".join(tokens), np.uint8)].tobytes().decode("utf-16-le")
    return _slices(content, tokens)


def _vocabulary(
    path: Path | str, vocab: dict[str, Any], merges: list[list[str]], special_tokens: dict[str, int]
) -> Vocabulary:
    """Put the parts together. Ids without a token, as between the special tokens of cl100k_base, get no bytes."""
    ids = dict(vocab)
    for name, token_id in special_tokens.items():
        if ids.setdefault(name, token_id) != token_id:
            raise UserError(
                f"{path} gives the special token {name!r} the ids {ids[name]} and {token_id}; mend the file"
            )
    _require_distinct_ids(path, ids)
    shown = [""] * (max(ids.values(), default=-1) + 1)
    for name, token_id in ids.items():
        shown[token_id] = "" if name in special_tokens else name
    tokens = _from_byte_characters(path, shown)
    for name, token_id in special_tokens.items():
        tokens[token_id] = name.encode()
    try:
        lefts, rights = zip(*merges, strict=True) if merges else ((), ())
        pairs = list(zip(map(ids.__getitem__, lefts), map(ids.__getitem__, rights), strict=True))
    except KeyError as error:
        raise UserError(f"{path} merges {error}, which is not in its vocabulary; mend the file") from None
    return Vocabulary(tokens, pairs, special_tokens)


def _require_distinct_ids(path: Path | str, ids: dict[str, Any]) -> None:
    """UserError unless every token has an id of its own, a whole number that a vocabulary can have."""
    if {type(token_id) for token_id in ids.values()} <= {int}:
        ends = (min(ids.values(), default=0), max(ids.values(), default=0))
        if len({*ids.values()}) == len(ids) and 0 <= ends[0] <= ends[1] < MAX_TOKENS:
            return
    seen: set[int] = set()
    for shown, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS or token_id in seen:
            raise UserError(
                f"{path} gives the token {shown!r} the id {token_id}; its {len(ids)} tokens must have ids of their "
                f"own, whole numbers from 0 to {MAX_TOKENS - 1}"
            )
        seen.add(token_id)


def _from_byte_characters(path: Path | str, shown: list[str]) -> list[bytes]:
    """Bytes of tokens that are written in GPT-2's byte characters."""
    found = _BYTES[np.frombuffer("".join(shown).encode("utf-16-le", "surrogatepass"), "<u2")]
    if (found == _NO_BYTE).any():
        characters = {*BYTE_TO_CHARACTER.values()}
        strange = next(token for token in shown if not characters.issuperset(token))
        raise UserError(
            f"{path} has the token {strange!r}, which is not written in GPT-2's byte characters; "
            "give a byte-level BPE vocabulary"
        )
    return _slices(found.astype(np.uint8).tobytes(), shown)


def _slices(content: AnyStr, parts: Sequence[Sized]) -> list[AnyStr]:
    """Split the content into slices as long as the parts."""
    stops: list[int] = list(itertools.accumulate(map(len, parts)))
    return [content[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _pairs(path: Path | str, entries: list[Any]) -> list[list[str]]:
    """Both sides of every merge, written "a b" or ["a", "b"]."""
    if {type(entry) for entry in entries} <= {str}:
        split = [entry.split(" ") for entry in entries]
        if {len(sides) for sides in split} <= {2}:
            return split
    pairs = []
    for entry in entries:
        sides = entry.split(" ") if isinstance(entry, str) else entry
        if type(sides) is not list or len(sides) != 2 or not type(sides[0]) is type(sides[1]) is str:
            raise UserError(f"{path} has the merge {entry!r}, which is not a pair of tokens; mend the file")
        pairs.append(sides)
    return pairs


def _special_tokens(path: Path | str, added: Any) -> dict[str, int]:
    if not isinstance(added, list):
        raise UserError(f"{path} has added_tokens that are no list; mend the file")
    special_tokens = {}
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise UserError(f"{path} has the added token {entry!r}, which has no content or no id; mend the file")
        odd = [flag for flag in ("single_word", "lstrip", "rstrip") if entry.get(flag)]
        odd += [] if entry.get("special") else ["special: false"]
        if odd:
            raise UserError(
                f"{path} has the added token {entry['content']!r} with {', '.join(odd)}, which this project does "
                "not do; give a tokenizer whose added tokens are plain special tokens"
            )
        special_tokens[entry["content"]] = entry["id"]
    return special_tokens


def _refuse_other_settings(path: Path | str, content: dict[str, Any], model: dict[str, Any]) -> Pattern:
    """The pattern of the file; UserError on anything under which `tokenizers` would give other ids than we do."""
    found = []
    if model.get("type", "BPE") != "BPE":
        found.append(f"a model of type {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            found.append(f"{name} {model[name]!r}")
    for name in ("normalizer", "truncation", "padding"):
        if content.get(name) is not None:
            found.append(f"the {name} {_name(content[name])}")
    pattern, problem = _pattern(content.get("pre_tokenizer"))
    if problem:
        found.append(problem)
    for name in ("post_processor", "decoder"):
        if content.get(name) is not None and _name(content[name]) != "ByteLevel" and not _adds_nothing(content[name]):
            found.append(f"the {name} {_name(content[name])}")
    if found or pattern is None:
        raise UserError(
            f"{path} has {', '.join(found)}; this project reads byte-level BPE with the pattern of GPT-2 or of cl100k "
            "only (pre-tokenizer ByteLevel with add_prefix_space false, or Split and ByteLevel, and no normalizer)"
        )
    return pattern


def _adds_nothing(part: Any) -> bool:
    """Whether a part is the template that transformers 5 writes for GPT-2: the ids of the text, and no others."""
    if _name(part) != "TemplateProcessing":
        return False
    sequences = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return bool(part.get("single") == sequences[:1] and part.get("pair") in (None, sequences))


def _pattern(pre_tokenizer: Any) -> tuple[Pattern | None, str]:
    """The pattern by which a pre-tokenizer splits text, or None and what is not supported about it."""
    name = _name(pre_tokenizer)
    if name == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space", True) or not pre_tokenizer.get("use_regex", True):
            return None, "a ByteLevel pre-tokenizer with add_prefix_space or without its pattern"
        return "gpt2", ""
    if name == "Sequence of Split, ByteLevel" and len(parts := _inner(pre_tokenizer, "pretokenizers")) == 2:
        pattern, problem = _split_pattern(*parts)
        return pattern, f"the pre-tokenizer {name} {problem}" if problem else ""
    return None, f"the pre-tokenizer {name}"


def _split_pattern(split: dict[str, Any], byte_level: dict[str, Any]) -> tuple[Pattern | None, str]:
    if byte_level.get("add_prefix_space", True) or byte_level.get("use_regex", True):
        return None, "with add_prefix_space or with a second pattern (use_regex)"
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None, "that does not keep each match (behavior Isolated, invert false)"
    rule = split.get("pattern")
    expression = rule.get("Regex") if isinstance(rule, dict) else None
    if isinstance(expression, str) and expression in _SPELLINGS:
        return _SPELLINGS[expression], ""
    shown = str(expression or rule)
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
    return None, f"with the pattern {shown!r}"


def _name(part: Any) -> str:
    """The type of a part of the file; of a sequence, the types in it."""
    if not isinstance(part, dict):
        return str(part).lower() if part is None else repr(part)
    inner = _inner(part, "pretokenizers", "normalizers", "processors", "decoders")
    return str(part.get("type", "of no type")) + (f" of {', '.join(_name(each) for each in inner)}" if inner else "")


def _inner(part: dict[str, Any], *names: str) -> list[Any]:
    """The parts of a sequence, which stand under the first of these names; none where there is no list."""
    return next((part[name] for name in names if part.get(name) and isinstance(part[name], list)), [])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer file {path}; give the path of a tokenizer.json") from None
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error


def _decode(content: bytes, path: Path | str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path | str, error: Exception) -> str:
    return f"{path} cannot be read as a tokenizer file ({error}); give the path of a tokenizer.json"


def _parse_json(content: bytes, path: Path | str) -> dict[str, Any]:
    try:
        values = json.loads(_decode(content, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch or write the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not an object; give a tokenizer file")
    return values
