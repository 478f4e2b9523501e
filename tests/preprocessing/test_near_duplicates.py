"""jobs/tokenize.py --dedup minhash on a real local Ray: what stays, for any workers, through kills in each stage."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.deduplication import near
from pipeline.deduplication.minhash import Scheme, sign
from pipeline.errors import UserError
from pipeline.preprocessing import duplicates, tokenization
from pipeline.storage.folders import TEMPORARY_PREFIX, open_folder
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.fixtures import contents
from tests.support.near_copies import planted

pytestmark = pytest.mark.usefixtures("local_ray")

SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Pairs at known similarity and texts of no word, in no order."""
    pairs = [planted(seed, similarity, 120) for seed, similarity in enumerate(SIMILARITIES * 8)]
    texts = [text for pair in pairs for text in pair] + ["...", "!!!", "two words", "Two WORDS."]
    random.Random(5).shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def config(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    folder = tmp_path_factory.mktemp("near")
    (folder / "texts").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in texts[number::4]]
        (folder / "texts" / f"{number}.jsonl").write_text("\n".join(lines))
    bpe_training.train_bpe(texts, 300).save(folder / "tokenizer.json")
    return TokenizeConfig(
        source=str(folder / "texts"),
        tokenizer=str(folder / "tokenizer.json"),
        item_bytes=12_000,
        val_fraction=0,
        num_workers=2,
        dedup="minhash",
    )


@pytest.fixture(scope="module")
def in_order(texts: list[str]) -> list[str]:
    """The texts in plan order."""
    return [text for number in range(4) for text in texts[number::4]]


@pytest.fixture(scope="module")
def expected(config: TokenizeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes."""
    output = tmp_path_factory.mktemp("undisturbed")
    tokenization.tokenize(config, open_folder(output))
    return contents(output)


def documents_of(output: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(output / "tokenizer.json")
    stream = open_split(output, "train")
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == tokenizer.eot_id)
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def kept(texts: list[str], scheme: Scheme) -> list[str]:
    """What stays by the keys of all texts together, joined one by one in plain Python."""
    keys, _, _ = sign(pa.array(texts, pa.large_string()), scheme)
    owner: dict[int, int] = {}
    group = list(range(len(texts)))
    for document, row in enumerate(keys.tolist()):
        for key in filter(None, row):
            other = group[owner.setdefault(key, document)]
            old, new = max(other, group[document]), min(other, group[document])
            group = [new if value == old else value for value in group]
    return [text for document, text in enumerate(texts) if group[document] == document]


def test_the_first_of_every_cluster_stays(config: TokenizeConfig, in_order: list[str], tmp_path: Path) -> None:
    report = tokenization.tokenize(config, open_folder(tmp_path))
    stays = kept(in_order, Scheme())
    assert documents_of(tmp_path) == stays
    manifest = Manifest.load(tmp_path)
    assert manifest.skipped == {"near-duplicate": len(in_order) - len(stays)} == report.skipped
    assert manifest.settings["dedup"] == "minhash" and "dedup_bands" not in manifest.settings
    assert report.num_items >= 4
    assert 20 <= len(in_order) - len(stays) <= 40  # all 8 at 1.0 and at 0.9, the two words, most at 0.8
    assert not [name for name in contents(tmp_path) if name.startswith("items/") and name.count("/") > 1]


def test_any_number_of_workers_and_partitions(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 4):
        monkeypatch.setattr(near, "_KEYS_PER_PARTITION", 400 // workers)
        output = tmp_path / str(workers)
        tokenization.tokenize(dataclasses.replace(config, num_workers=workers), open_folder(output))
        assert contents(output) == expected


@pytest.mark.parametrize("stage", ["sign_documents", "pair_documents", "join_pairs"])
def test_killed_in_each_stage(
    config: TokenizeConfig, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A worker is killed when it has written, its second try ends the run, and the same command goes on."""
    output, killed, stopped = tmp_path / "out", tmp_path / "killed", tmp_path / "stopped"
    undisturbed = getattr(duplicates, stage)

    def disturbed(table: pa.Table, **arguments: Any) -> Iterator[pa.Table]:
        for result in undisturbed(table, **arguments):
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if stopped.exists():
                yield result
            else:
                stopped.touch()
                raise ValueError("stopped")

    monkeypatch.setattr(near, "_KEYS_PER_PARTITION", 400)
    monkeypatch.setattr(duplicates, stage, disturbed)
    with pytest.raises(Exception, match="stopped"):
        tokenization.tokenize(config, open_folder(output))
    assert killed.exists() and stopped.exists()
    monkeypatch.setattr(duplicates, stage, undisturbed)
    # other tasks of the run that ended may still be writing: what they have begun is not there yet
    written = [path for path in output.glob("items/*/*") if not path.name.startswith(TEMPORARY_PREFIX)]
    before = {path: path.stat().st_mtime_ns for path in written if "duplicates" not in path.parts}
    assert before
    removed = duplicates.remove_files
    seen: dict[Path, int] = {}

    def note(folder: Any) -> None:
        seen.update({path: path.stat().st_mtime_ns for path in before})
        removed(folder)

    monkeypatch.setattr(duplicates, "remove_files", note)
    tokenization.tokenize(config, open_folder(output))
    assert seen == before  # what was there is not made again
    assert contents(output) == expected


def test_an_exact_check_and_other_bands(config: TokenizeConfig, in_order: list[str], tmp_path: Path) -> None:
    loose = dataclasses.replace(config, dedup_bands=40, dedup_rows=3, dedup_words=3)
    tokenization.tokenize(loose, open_folder(tmp_path / "loose"))
    assert documents_of(tmp_path / "loose") == kept(in_order, Scheme(words=3, bands=40, rows=3))
    assert Manifest.load(tmp_path / "loose").settings["dedup_bands"] == 40
    checked = dataclasses.replace(config, dedup_bands=40, dedup_rows=3, dedup_threshold=0.85)
    tokenization.tokenize(checked, open_folder(tmp_path / "checked"))
    skipped = Manifest.load(tmp_path / "checked").skipped["near-duplicate"]
    assert skipped == 17  # 8 pairs at 1.0, 8 at 0.9, and the two words
    with pytest.raises(UserError, match=r"was begun with dedup_threshold 0.85, not left out"):
        tokenization.tokenize(dataclasses.replace(checked, dedup_threshold=None), open_folder(tmp_path / "checked"))


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_thresholds_that_make_no_sense(threshold: float) -> None:
    with pytest.raises(UserError, match=r"dedup_threshold is .*; it must lie above 0 and up to 1"):
        TokenizeConfig(dedup_threshold=threshold)
