"""jobs/tokenize.py with rules, on a real local Ray: what stays and what is counted, also before near-duplicates."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.errors import UserError
from pipeline.filters.rules import Rules
from pipeline.preprocessing import tokenization, tokenize_job
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from tests.support import filter_texts
from tests.support.fixtures import contents
from tests.support.language_texts import PARAGRAPHS

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    some = filter_texts.texts(380)[:120]
    return [*some, *some[:40], "write to jane@mail.example.org"]


@pytest.fixture
def config(texts: list[str], tmp_path: Path) -> TokenizeConfig:
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    bpe_training.train_bpe(texts, 300).save(tmp_path / "tokenizer.json")
    return TokenizeConfig(
        source=str(tmp_path / "texts.jsonl"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        item_bytes=40_000,
        val_fraction=0,
        num_workers=2,
    )


def documents_of(output: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(output / "tokenizer.json")
    stream = open_split(output, "train")
    ids = stream.read(0, len(stream))
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot_id)[1:])]


def test_what_breaks_a_rule_is_left_out_before_copies_are_looked_for(
    config: TokenizeConfig, texts: list[str], tmp_path: Path
) -> None:
    rules = Rules(groups=("gopher", "c4"), bounds=("gopher.min_words=20",), mask_personal_data=True)
    chosen = dataclasses.replace(
        config, filters=("gopher", "c4"), filter_bounds=rules.bounds, mask_personal_data=True, dedup="exact"
    )
    report = tokenization.tokenize(chosen, open_folder(tmp_path / "out"))
    decisions = [rules.apply(text) for text in texts]
    stays = [text for text, broken in decisions if broken is None]
    assert documents_of(tmp_path / "out") == list(dict.fromkeys(stays))
    expected = Counter(broken for _, broken in decisions if broken) + Counter(duplicate=len(stays) - len(set(stays)))
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.skipped == expected == report.skipped
    assert len(expected) > 6 and expected["duplicate"]
    assert manifest.settings["filters"] == ["gopher", "c4"]
    before = contents(tmp_path / "out")
    assert tokenization.finished(chosen, open_folder(tmp_path / "out")) == manifest
    max((tmp_path / "out").glob("train_*.bin")).unlink()
    tokenization.tokenize(dataclasses.replace(chosen, num_workers=1), open_folder(tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_mistakes_are_found_before_anything_is_read(config: TokenizeConfig, tmp_path: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"own_rules": ("no_module_x:f",)},
        {"filter_bounds": ("gopher.min_wrds=3",)},
        {"languages": ("en", "english")},
    )
    for changed in changes:
        with pytest.raises(UserError, match=r"no_module_x|gopher\.min_wrds|languages has english, which names none"):
            tokenization.tokenize(dataclasses.replace(config, **changed), open_folder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_languages_are_counted_and_noted(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in PARAGRAPHS.values()))
    chosen = dataclasses.replace(config, languages=("en", "de"))
    folder = open_folder(tmp_path / "out")
    tokenization.tokenize(chosen, folder)
    assert documents_of(tmp_path / "out") == [PARAGRAPHS["en"], PARAGRAPHS["de"]]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.skipped == {f"language: {code}": 1 for code in PARAGRAPHS if code not in {"en", "de"}}
    assert manifest.settings["languages"] == ["en", "de"] and "language_score" not in manifest.settings
    assert tokenization.finished(chosen, folder) == manifest
    for other in ({"languages": ("en",)}, {"language_score": 0.5}, {"languages": ()}):
        with pytest.raises(UserError, match="was begun with"):
            tokenization.finished(dataclasses.replace(chosen, **other), folder)


def test_the_filter_report_is_the_same_for_any_workers(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.html"
    chosen = dataclasses.replace(
        config, filters=("gopher",), filter_report=str(path), output=str(tmp_path / "out"), tracking_uri=None
    )
    report, _, was_there = tokenize_job.tokenize(chosen)
    page = path.read_text()
    assert not was_there and "gopher: min_words" in page and "161 documents" in page
    for reason, count in report.skipped.items():
        assert f">{reason}</td>" in page and f">{count:,}</td>" in page
    path.unlink()
    assert tokenize_job.tokenize(dataclasses.replace(chosen, num_workers=1))[2]
    assert path.read_text() == page
    with pytest.raises(UserError, match="filter_report is a page about rules"):
        dataclasses.replace(chosen, filters=())
