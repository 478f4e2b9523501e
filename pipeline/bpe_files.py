"""Reading and writing of vocabularies: Hugging Face ``tokenizer.json`` and GPT-2's ``vocab.json`` with ``merges.txt``.

Both write bytes as printable characters, GPT-2's way: the 188 printable bytes of Latin-1 as themselves, the other 68 as
the characters from U+0100 on, in order. What another tokenizer would do differently is refused by name, never ignored.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
# Tables for str.translate, between such a string and Latin-1; a character that stands for no byte becomes U+FFFD, which
# Latin-1 cannot encode.
_TO_LATIN = dict.fromkeys(_HIDDEN, "�") | {ord(shown): chr(byte) for byte, shown in BYTE_TO_CHARACTER.items()}
_FROM_LATIN = dict(BYTE_TO_CHARACTER)


class Vocabulary(NamedTuple):
    """What a tokenizer file says: the bytes of every id, the pairs of ids to merge, in order, and the special ones."""

    tokens: list[bytes]
    merges: list[tuple[int, int]]
    special_tokens: dict[str, int]


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary of a byte-level BPE ``tokenizer.json``; UserError names whatever this project does not do."""
    content = _read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{path} has no model with a vocabulary; give a byte-level BPE tokenizer.json")
    _refuse_other_settings(path, content, model)
    special_tokens = _special_tokens(path, content.get("added_tokens") or [])
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{path} has no list of merges; give a byte-level BPE tokenizer.json")
    return _vocabulary(path, model["vocab"], [_pair(path, entry) for entry in merges], special_tokens)


def read_gpt2(vocab_json: Path, merges_txt: Path, end_of_text: str) -> Vocabulary:
    """The vocabulary of GPT-2's two files; the only special token is end_of_text, if the vocabulary has it."""
    vocab = _read_json(vocab_json)
    lines = _read_text(merges_txt).split("\n")
    merges = [_pair(merges_txt, line) for line in lines if line and not line.startswith("#version")]
    special_tokens = {end_of_text: vocab[end_of_text]} if end_of_text in vocab else {}
    return _vocabulary(vocab_json, vocab, merges, special_tokens)


def write_tokenizer_json(path: Path, vocabulary: Vocabulary) -> None:
    """Write ``tokenizer.json``: complete or not at all, the same bytes for the same vocabulary."""
    names = {token_id: name for name, token_id in vocabulary.special_tokens.items()}
    shown = [names.get(token_id) or show(token) for token_id, token in enumerate(vocabulary.tokens)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": name, **flags, "special": True} for token_id, name in sorted(names.items())
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(shown)},
            "merges": [f"{shown[left]} {shown[right]}" for left, right in vocabulary.merges],
        },
    }
    _write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def show(token: bytes) -> str:
    """Bytes as GPT-2's printable characters."""
    return token.decode("latin-1").translate(_FROM_LATIN)


def _unshow(path: Path, shown: str) -> bytes:
    try:
        return shown.translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        raise UserError(
            f"{path} has the token {shown!r}, which is not written in GPT-2's byte characters; "
            "give a byte-level BPE vocabulary"
        ) from None


def _vocabulary(
    path: Path, vocab: dict[str, Any], merges: list[list[str]], special_tokens: dict[str, int]
) -> Vocabulary:
    """Put the parts together; ids must be 0, 1, 2, ... without holes."""
    ids = dict(vocab)
    for name, token_id in special_tokens.items():
        if ids.setdefault(name, token_id) != token_id:
            raise UserError(
                f"{path} gives the special token {name!r} the ids {ids[name]} and {token_id}; mend the file"
            )
    tokens: list[bytes | None] = [None] * len(ids)
    for shown, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < len(ids) or tokens[token_id] is not None:
            raise UserError(
                f"{path} gives the token {shown!r} the id {token_id}; "
                f"its {len(ids)} tokens must have the ids 0 to {len(ids) - 1}"
            )
        tokens[token_id] = shown.encode() if shown in special_tokens else _unshow(path, shown)
    pairs = []
    for entry in merges:
        try:
            pairs.append((ids[entry[0]], ids[entry[1]]))
        except KeyError as error:
            raise UserError(f"{path} merges {error}, which is not in its vocabulary; mend the file") from None
    return Vocabulary([token for token in tokens if token is not None], pairs, special_tokens)


def _pair(path: Path, entry: Any) -> list[str]:
    """Both sides of a merge, written "a b" or ["a", "b"]."""
    sides = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, str) for side in sides):
        raise UserError(f"{path} has the merge {entry!r}, which is not a pair of tokens; mend the file")
    return sides


def _special_tokens(path: Path, added: Any) -> dict[str, int]:
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


def _refuse_other_settings(path: Path, content: dict[str, Any], model: dict[str, Any]) -> None:
    """UserError on anything under which `tokenizers` would give other ids than we do."""
    found = []
    if model.get("type", "BPE") != "BPE":
        found.append(f"a model of type {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            found.append(f"{name} {model[name]!r}")
    for name in ("normalizer", "truncation", "padding"):
        if content.get(name) is not None:
            found.append(f"the {name} {_name(content[name])}")
    pre_tokenizer: Any = content.get("pre_tokenizer")
    if _name(pre_tokenizer) != "ByteLevel":
        found.append(f"the pre-tokenizer {_name(pre_tokenizer)}")
    elif pre_tokenizer.get("add_prefix_space", True) or not pre_tokenizer.get("use_regex", True):
        found.append("a ByteLevel pre-tokenizer with add_prefix_space or without its pattern")
    for name in ("post_processor", "decoder"):
        if content.get(name) is not None and _name(content[name]) != "ByteLevel":
            found.append(f"the {name} {_name(content[name])}")
    if found:
        raise UserError(
            f"{path} has {', '.join(found)}; this project reads byte-level BPE with GPT-2's pattern only "
            "(pre-tokenizer ByteLevel, add_prefix_space false, no normalizer)"
        )


def _name(part: Any) -> str:
    """The type of a part of the file; of a sequence, the types in it."""
    if not isinstance(part, dict):
        return str(part).lower() if part is None else repr(part)
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("processors") or part.get("decoders") or []
    return str(part.get("type", "of no type")) + (f" of {', '.join(_name(each) for each in inner)}" if inner else "")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer file {path}; give the path of a tokenizer.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as a tokenizer file ({error}); give the path of a tokenizer.json"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch or write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object; give a tokenizer file")
    return content


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
