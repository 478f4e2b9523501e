"""Documents as people have them, through the whole job: separators, tails held out, other tokens, records left out."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.dataset.dataset import open_data
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.preprocessing import resume_state, tokenization
from pipeline.preprocessing.encode_documents import split_by_position
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.bpe_references import gpt2, gpt2_tiktoken

pytestmark = pytest.mark.usefixtures("local_ray")

BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def config(tmp_path: Path) -> TokenizeConfig:
    Tokenizer([*BYTES, b"<|endoftext|>", b"</s>"], [], {"<|endoftext|>": 256, "</s>": 257}).save(tmp_path / "tok.json")
    (tmp_path / "in").mkdir()
    return TokenizeConfig(
        source=str(tmp_path / "in"), tokenizer=str(tmp_path / "tok.json"), val_fraction=0.0, num_workers=1
    )


def tokenize(config: TokenizeConfig, output: Path, **changes: Any) -> tokenization.DataReport:
    return tokenization.tokenize(dataclasses.replace(config, **changes), open_folder(output))


def read_split(output: Path, split: str) -> list[str]:
    tokenizer, manifest = open_data(open_folder(output))
    stream = open_split(output, split)
    ids = stream.read(0, len(stream))
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == manifest.eot_id)[1:])]


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["skip_bad_records", "skip_bad_files"])
def test_bad_records_are_counted_and_the_first_is_named(config: TokenizeConfig, tmp_path: Path, flag: str) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(200)]
    expected = [json.loads(line)["text"] for line in lines]
    for number, line in ((9, '{"url": "no text"}'), (20, '{"text": [1]}'), (30, "{"), (40, '{"id": 1}')):
        lines[number] = line
        expected.remove(f"document {number}")
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 10 of .*in/a\.jsonl has no key 'text', only url"):
        tokenize(config, tmp_path / "out")
    report = tokenize(config, tmp_path / "out", **{flag: True})
    assert read_split(tmp_path / "out", "train") == expected
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.skipped == report.skipped == {"not JSON": 1, "not text": 1, "without the key": 2}
    assert manifest.first_skipped == report.first_skipped
    assert manifest.first_skipped["without the key"].startswith("line 10 of a.jsonl has no key 'text'")
    assert manifest.damaged == () and verify(tmp_path / "out") == []
    assert str(tmp_path) not in (tmp_path / "out/manifest.json").read_text(encoding="utf-8")


def test_nothing_but_bad_records_names_the_first(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "in/a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"be used \(2 without the key\); the first: line 1 of a\.jsonl has no key"):
        tokenize(config, tmp_path / "out", skip_bad_records=True)


# ---- documents -------------------------------------------------------------------------------------------------------


def test_one_text_file_of_many_documents(
    config: TokenizeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stories = [f"Story {number}.\n\nIt ends." for number in range(300)]
    (tmp_path / "in/stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "pipeline"):
        tokenize(config, tmp_path / "one", val_fraction=0.1)
    assert "stories.txt holds the separator <|endoftext|>, but every text file is taken as one document" in caplog.text
    assert "the source has one document, too few for --val_fraction 0.1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pipeline"):
        given = {"document_separator": "<|endoftext|>", "val_fraction": 0.1, "item_bytes": 1000}
        report = tokenize(config, tmp_path / "out", **given)
    assert not caplog.text and report.documents == 300 and report.val_tokens > 0
    assert sorted(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")) == sorted(stories)
    assert Manifest.load(tmp_path / "out").settings["document_separator"] == "<|endoftext|>"
    tokenize(config, tmp_path / "blank", document_separator=r"\n\n")
    assert len(read_split(tmp_path / "blank", "train")) == 301
    with pytest.raises(UserError, match=r"was begun with document_separator <\|endoftext\|>, not left out"):
        tokenize(config, tmp_path / "out", val_fraction=0.1, item_bytes=1000)


def test_the_tail_of_one_text_as_nanogpt_holds_it_out(config: TokenizeConfig, tmp_path: Path) -> None:
    """data/shakespeare/prepare.py: n characters, the first int(n * 0.9) are train, each part encoded on its own."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak — ½.\n\n" * 200
    (tmp_path / "in/input.txt").write_text(text, encoding="utf-8")
    gpt2().save(tmp_path / "gpt2.json")
    tokenize(config, tmp_path / "out", tokenizer=str(tmp_path / "gpt2.json"), val_split="tail", val_fraction=0.1)
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        stream = open_split(tmp_path / "out", split)
        assert stream.read(0, len(stream)).tolist() == [50256, *gpt2_tiktoken().encode_ordinary(part)]


@given(texts=st.lists(st.text(max_size=30), max_size=6), fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
def test_tails_of_any_texts(texts: list[str], fraction: float) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    arrays = pa.chunked_array([pa.array(["before", *texts], pa.large_string())[1:]])
    train, val = (part.to_pylist() for part in split_by_position(arrays, fraction))
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    assert train == ([head for head in heads if head] if fraction else texts)
    assert val == [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:]]


# ---- the token between documents -------------------------------------------------------------------------------------


def test_another_token_between_documents(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "in/a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    tokenize(config, tmp_path / "out", end_of_text_token="</s>")
    stream = open_split(tmp_path / "out", "train")
    assert stream.read(0, len(stream)).tolist() == [257, 97, 257, 98]
    tokenizer, manifest = open_data(open_folder(tmp_path / "out"))
    assert (manifest.eot_id, tokenizer.eot_id, tokenizer.end_of_text) == (257, 257, "</s>")
    assert verify(tmp_path / "out") == []
    trained = dataclasses.replace(config, tokenizer=None, vocab_size=257, end_of_text_token="[DOC]")
    tokenize(trained, tmp_path / "trained")
    assert open_data(open_folder(tmp_path / "trained"))[0].special_tokens == {"[DOC]": 256}
    (tmp_path / "trained/manifest.json").unlink()
    tokenize(trained, tmp_path / "trained")


def test_a_tokenizer_without_the_token_is_said_before_any_work(config: TokenizeConfig, tmp_path: Path) -> None:
    Tokenizer([*BYTES, b"</s>"], [], {"</s>": 256}).save(tmp_path / "tok.json")
    (tmp_path / "in/a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no special token <\|endoftext\|>, but \['</s>'\]; name the one between"):
        tokenize(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_without_the_new_flags_are_what_they_were(config: TokenizeConfig) -> None:
    names = {"item_bytes", "text_column", "val_fraction", "limit_documents", "limit_bytes", "dedup"}
    assert resume_state.settings_of(config, "f" * 64).keys() == names | {"split_hash", "tokenizer"}
    assert resume_state.later_settings(TrainTokenizerConfig()) == {}
    given = dataclasses.replace(config, val_split="tail", max_document_bytes=9, column_separator=" ")
    assert resume_state.later_settings(given) == {
        "column_separator": " ",
        "max_document_bytes": 9,
        "val_split": "tail",
    }
