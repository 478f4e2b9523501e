"""tokenizer.json: read by `tokenizers` and `transformers` as it is, read back the same, refused by name if other."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tokenizer import files as tokenizer_files
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.files import read_tokenizer_json, write_tokenizer_json
from pipeline.tokenizer.patterns import PATTERNS, Pattern
from pipeline.tokenizer.training import train_bpe
from pipeline.tokenizer.vocabulary import Vocabulary
from tests.support.bpe_references import (
    BOTH,
    EXPRESSIONS,
    NASTY,
    documents,
    gpt2,
    pretokens,
    tiktoken_pretokens,
    tokenizers_pretokens,
)

END = "<|endoftext|>"
TEXTS = ["".join(NASTY), "It's 1984, isn't it?\n\n  Yes. ", "", " ", f"a{END} b", "naïve 漢字 \U0001f600", "aaaa" * 100]
BYTE_TOKENS = [bytes([byte]) for byte in range(256)]


def sequence(expression: str, *, use_regex: bool = False, **settings: Any) -> dict[str, Any]:
    """The pre-tokenizer that cuts by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | settings
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.fixture(scope="module", params=BOTH)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    texts = ["the cat and the hat, the naïve cat's hat 1984 \U0001f600\n\n"] * 3 + ["aaaa" * 9]
    return train_bpe(texts, 280, pattern=request.param)


@pytest.fixture(scope="module")
def path(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "tokenizer.json"
    trained.save(path)
    return path


@settings(max_examples=300)
@given(st.lists(st.sampled_from(NASTY), max_size=40).map("".join))
def test_tokenizers_gives_our_ids(trained: Tokenizer, path: Path, text: str) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.encode(text).ids == trained.encode(text, {END})
    theirs.encode_special_tokens = True
    assert theirs.encode(text).ids == trained.encode(text)
    assert theirs.decode(trained.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("pattern", BOTH)
def test_real_text_in_tokenizers_and_transformers(tmp_path: Path, pattern: Pattern) -> None:
    texts = [*documents(100), *TEXTS]
    gpt2(pattern).save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == gpt2().vocab_size == 50257
    assert theirs.token_to_id(END) == gpt2().eot_id == 50256
    expected = [gpt2(pattern).encode(text, {END}) for text in texts]
    assert [encoding.ids for encoding in theirs.encode_batch(texts)] == expected
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert fast(texts)["input_ids"] == expected
    assert fast.decode(expected[-3]) == TEXTS[-3]


def test_what_was_saved_is_read_back(trained: Tokenizer, path: Path, tmp_path: Path) -> None:
    copy = Tokenizer.from_file(path)
    assert copy.fingerprint == trained.fingerprint and copy.pattern == trained.pattern
    assert copy.special_tokens == trained.special_tokens
    copy.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("pattern", BOTH)
def test_what_tokenizers_trains_is_read(tmp_path: Path, pattern: Pattern) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(EXPRESSIONS[pattern]), "isolated")
    theirs.pre_tokenizer = byte_level
    if pattern == "cl100k":
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet)
    theirs.train_from_iterator(["the cat and the hat, the naïve cat's hat"] * 3, trainer)
    theirs.save(str(tmp_path / "theirs.json"))
    ours = Tokenizer.from_file(tmp_path / "theirs.json")
    assert ours.pattern == pattern and ours.eot_id == 0 and ours.vocab_size == theirs.get_vocab_size()
    for text in TEXTS:
        assert ours.encode(text, {END}) == theirs.encode(text).ids


# --- patterns --------------------------------------------------------------------------------------------------------

TIKTOKEN_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
TIKTOKEN_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)

HASH_OF_GPT2_FILE = "f7ca4bd3e1b35bca60d3833ca4f87512dcbafbcf5811b0e54f7e3d3e61b70b00"


def read(folder: Path, pre_tokenizer: dict[str, Any]) -> Vocabulary:
    """The vocabulary of 256 bytes with a pre-tokenizer, as read from a file."""
    write_tokenizer_json(folder / "tokenizer.json", Vocabulary(BYTE_TOKENS, [], {}))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"pre_tokenizer": pre_tokenizer}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return read_tokenizer_json(folder / "tokenizer.json")


def test_the_file_of_gpt2s_pattern_is_what_it_always_was(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json", Vocabulary([*BYTE_TOKENS, b"ab"], [(97, 98)], {}))
    assert hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == HASH_OF_GPT2_FILE


@pytest.mark.parametrize("pattern", BOTH)
def test_the_pattern_is_part_of_the_file(tmp_path: Path, pattern: Pattern) -> None:
    written = Vocabulary([*BYTE_TOKENS, b"ab"], [(97, 98)], {}, pattern)
    write_tokenizer_json(tmp_path / "tokenizer.json", written)
    assert read_tokenizer_json(tmp_path / "tokenizer.json") == written
    shown = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    assert shown["type"] == {"gpt2": "ByteLevel", "cl100k": "Sequence"}[pattern]
    assert PATTERNS == EXPRESSIONS


@pytest.mark.parametrize("expression", tokenizer_files._SPELLINGS)
def test_every_spelling_that_is_read_cuts_alike(tmp_path: Path, expression: str) -> None:
    pattern = read(tmp_path, sequence(expression)).pattern
    chance = random.Random(expression)
    texts = ["".join(chance.choices(NASTY, k=chance.randint(0, 9))) for _ in range(400)]
    expected = [pretokens(text.encode(), pattern) for text in texts]
    assert tokenizers_pretokens(texts, expression) == expected
    assert tiktoken_pretokens(texts, expression) == expected


def test_the_pattern_of_tiktokens_own_cl100k_is_another(tmp_path: Path) -> None:
    # Made for speed, and different at the end of a text; `tokenizers` besides reads {1,3}+ as any number.
    assert read(tmp_path, sequence(TIKTOKEN_GPT2)).pattern == "gpt2"
    with pytest.raises(UserError, match="with the pattern \"'"):
        read(tmp_path, sequence(TIKTOKEN_CL100K))
    assert tiktoken_pretokens(["\n "], TIKTOKEN_CL100K) == [[b"\n "]]
    assert tiktoken_pretokens(["\n "], EXPRESSIONS["cl100k"]) == [[b"\n", b" "]]
    assert tiktoken_pretokens(["1234"], TIKTOKEN_CL100K) == [[b"123", b"4"]]
    assert tokenizers_pretokens(["1234"], TIKTOKEN_CL100K) == [[b"1234"]]


@pytest.mark.parametrize(
    ("pre_tokenizer", "message"),
    [
        (sequence(r"\s+"), r"with the pattern '\\\\s\+'"),
        (sequence("x" * 500), f"with the pattern '{'x' * 120}[.][.][.]'"),
        (sequence(""), "with the pattern"),
        (sequence("", pattern={"String": " "}), "with the pattern"),
        (sequence(PATTERNS["cl100k"].replace("{1,3}", "")), "with the pattern"),
        (sequence(PATTERNS["cl100k"], use_regex=True), "a second pattern"),
        (sequence(PATTERNS["cl100k"], behavior="Removed"), "that does not keep each match"),
        (sequence(PATTERNS["cl100k"], invert=True), "that does not keep each match"),
        (
            {"type": "Sequence", "pretokenizers": sequence("x")["pretokenizers"][:1]},
            "the pre-tokenizer Sequence of Split;",
        ),
        (sequence("x")["pretokenizers"][0], "the pre-tokenizer Split;"),
        ({"type": "Digits"}, "the pre-tokenizer Digits;"),
    ],
)
def test_other_patterns_are_refused_by_name(tmp_path: Path, pre_tokenizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, pre_tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        {"type": "Sequence", "pretokenizers": 1},
        {"type": "Sequence", "pretokenizers": {"Split": 1, "ByteLevel": 2}},
        {"type": "Sequence of Split, ByteLevel"},
        {"type": "Sequence of Split", "pretokenizers": [{"type": "ByteLevel"}]},
        {"type": "Sequence", "decoders": [{"type": "Split"}, {"type": "ByteLevel"}]},
        {"type": "Sequence", "pretokenizers": ["Split", None]},
        ["ByteLevel"],
        "ByteLevel",
    ],
)
def test_pre_tokenizers_of_wrong_types_are_refused_in_a_sentence(tmp_path: Path, pre_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the pre-tokenizer"):
        read(tmp_path, pre_tokenizer)


def test_what_else_the_file_of_llama_3_does_is_refused_by_name(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json", Vocabulary(BYTE_TOKENS, [], {}, "cl100k"))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}]}
    content["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    content["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_tokenizer_json(tmp_path / "tokenizer.json")
    expected = "has ignore_merges True, the post_processor Sequence of ByteLevel, TemplateProcessing; this project"
    assert expected in str(caught.value)


def test_the_template_of_transformers_5_is_read_as_it_adds_nothing(trained: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers.processors import TemplateProcessing

    trained.save(tmp_path / "tokenizer.json")
    theirs = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.post_processor = TemplateProcessing(single="$0", pair="$A:0 $B:1", special_tokens=[])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert ours.fingerprint == trained.fingerprint
    assert ours.encode("It's a test") == theirs.encode("It's a test").ids
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"]["single"].insert(0, first)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="the post_processor TemplateProcessing"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


# --- files that are refused ------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old", encoding="utf-8")

    def fail(_file: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.storage.folders.os.fsync", fail)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be written: disk full"):
        trained.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"] and path.read_text(
        encoding="utf-8"
    ) == "old"


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets content[key][key]... to a value."""

    def apply(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("pre_tokenizer", to={"type": "Whitespace"}), "the pre-tokenizer Whitespace"),
        (change("pre_tokenizer", to=None), "the pre-tokenizer none"),
        (change("pre_tokenizer", to={"type": "ByteLevel"}), "add_prefix_space"),
        (
            change("pre_tokenizer", to={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
            "without its",
        ),
        (change("normalizer", to={"type": "NFC"}), "the normalizer NFC"),
        (change("decoder", to={"type": "Metaspace"}), "the decoder Metaspace"),
        (change("post_processor", to={"type": "TemplateProcessing"}), "the post_processor TemplateProcessing"),
        (change("truncation", to={"max_length": 5}), "the truncation"),
        (change("model", "type", to="WordPretoken"), "a model of type WordPretoken"),
        (change("model", "type", to="Unigram"), "a model of type Unigram"),
        (change("model", "byte_fallback", to=True), "byte_fallback True"),
        (change("model", "ignore_merges", to=True), "ignore_merges True"),
        (change("model", "dropout", to=0.1), "dropout 0.1"),
        (change("model", "vocab", to=[]), "no model with a vocabulary"),
        (change("model", to=None), "no model"),
        (change("model", "merges", to={}), "no list of merges"),
        (change("model", "merges", 0, to="a b c"), "the merge 'a b c'"),
        (change("model", "merges", 0, to="zzz q"), "merges 'zzz'"),
        (change("model", "merges", 0, to="z q"), "not in its vocabulary"),
        (change("model", "vocab", "a", to=2**20), "the id 1048576"),
        (change("model", "vocab", "a", to="7"), "the id 7"),
        (change("model", "vocab", "a b", to=280), "byte characters"),
        (change("added_tokens", 0, "id", to=7), "the ids 279 and 7"),
        (change("added_tokens", 0, "special", to=False), "special: false"),
        (change("added_tokens", 0, "lstrip", to=True), "lstrip"),
        (change("added_tokens", 0, to="x"), "no content or no id"),
        (change("added_tokens", to=1e308), "added_tokens that are no list"),
    ],
)
def test_other_files_are_refused_by_name(
    path: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_file(other)
    assert str(other) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        Tokenizer.from_file(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"s3://bucket/broken\.json"):
        Tokenizer.from_json(content, "s3://bucket/broken.json")


def test_the_content_of_a_file_is_read_as_the_file(path: Path) -> None:
    assert Tokenizer.from_json(path.read_bytes(), "anywhere").fingerprint == Tokenizer.from_file(path).fingerprint


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no tokenizer file .*none\.json"):
        Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 5000))
def test_a_file_cut_anywhere_is_refused(path: Path, tmp_path: Path, position: int) -> None:
    data = path.read_bytes()
    (tmp_path / "cut.json").write_bytes(data[: min(position, len(data) - 3)])
    with pytest.raises(UserError):
        Tokenizer.from_file(tmp_path / "cut.json")


def test_a_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    train_bpe(["abc"], 257, special_tokens=[]).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"no special token <\|endoftext\|>"):
        _ = Tokenizer.from_file(tmp_path / "tokenizer.json").eot_id
