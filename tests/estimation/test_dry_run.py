"""What jobs/tokenize.py --dry_run says, in its words: the same figures as the job's, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.estimation.dry_run import describe_work
from pipeline.preprocessing import tokenization
from pipeline.storage.folders import open_folder
from pipeline.tokenizer import training as bpe_training
from tests.support import filter_texts
from tests.support.file_server import running_files
from tests.support.fixtures import ROOT


@pytest.fixture
def config(corpus: Path, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizeConfig:
    monkeypatch.delenv("GPT25_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    bpe_training.train_bpe(documents, 300).save(tmp_path / "tokenizer.json")
    return TokenizeConfig(
        source=str(corpus),
        output=str(tmp_path / "out"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        item_bytes=12_000,
        val_fraction=0,
        num_workers=2,
    )


def rows_of(config: TokenizeConfig) -> dict[str, str]:
    rows = describe_work(config)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def number(text: str) -> int:
    """The first number of a sentence."""
    found = re.search(r"[\d,]+", text)
    assert found
    return int(found[0].replace(",", ""))


@pytest.mark.usefixtures("local_ray")
def test_the_figures_of_a_small_source_are_the_jobs(config: TokenizeConfig, tmp_path: Path) -> None:
    texts = [*filter_texts.texts(200), "write to jane@mail.example.org " * 40]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = dataclasses.replace(
        config,
        source=str(tmp_path / "texts.jsonl"),
        item_bytes=40_000,
        filters=("gopher", "fineweb"),
        filter_bounds=("gopher.min_words=10",),
        mask_personal_data=True,
    )
    rows = rows_of(chosen)
    assert not (tmp_path / "out").exists()
    tokenization.tokenize(chosen, open_folder(tmp_path / "out"))
    manifest = Manifest.load(tmp_path / "out")
    assert number(rows["tokens"]) == manifest.tokens("train")
    documents = manifest.documents("train")
    assert rows["documents"].startswith("about 201, of which ") and rows["documents"].endswith(f": {documents:,}")
    for reason, count in Counter(manifest.skipped).most_common(6):
        assert f"{count} {reason}" in rows["left out"]
    assert number(rows["source"].partition(", in ")[2]) == len({entry.source for entry in manifest.shards})


def test_minutes_and_dollars_on_nodes(config: TokenizeConfig) -> None:
    rows = rows_of(dataclasses.replace(config, nodes="2x3", price_per_hour=36000.0))
    assert "on 2 nodes with 6 CPUs in all (--nodes)" in rows["on nodes"]
    speed = re.fullmatch(
        r"([\d.]+) ([Mk]?B)/s of text on one core here \(reading (\d+)%, encoding (\d+)%\)", rows["speed"]
    )
    assert speed and abs(int(speed[3]) + int(speed[4]) - 100) <= 1
    cost = re.fullmatch(r"\$([\d.]+) for the work, at \$36000 a node and hour, without .* head", rows["cost"])
    assert cost and rows["time here"].endswith(" minutes on 2 CPUs, without writing, the start of Ray")
    assert "where" in rows["shards"] and "free" in rows["shards"] and "download" not in rows


def test_no_price_and_no_nodes_are_made_up(config: TokenizeConfig) -> None:
    assert "--nodes takes NUMBERxCPUS" in rows_of(config)["cost"]
    assert "--price_per_hour takes" in rows_of(dataclasses.replace(config, nodes="2x3"))["cost"]
    assert rows_of(dataclasses.replace(config, nodes="two"))["cost"].startswith("unknown: nodes: ")


def test_a_remote_source_has_a_row_about_its_download(config: TokenizeConfig, corpus: Path) -> None:
    with running_files({"a.parquet": (corpus / "a.parquet").read_bytes()}) as server:
        rows = rows_of(dataclasses.replace(config, source=f"{server.url}/a.parquet"))
    assert re.match(r"[\d,.]+ [Mk]B/s here with one request of 1 MB at a time: 0.\d\d minutes", rows["download"])
    assert rows["documents"].startswith("about 160, ")


def test_a_broken_file_would_fail_unless_it_is_left_out(config: TokenizeConfig, corpus: Path) -> None:
    (corpus / "d.jsonl").write_text("no JSON\n")
    assert "d.jsonl" in rows_of(config)["would fail"] and "tokens" in rows_of(config)
    left = rows_of(dataclasses.replace(config, skip_bad_files=True))
    assert "would fail" not in left and "1 not JSON" in left["left out"]


def test_nothing_to_read(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="the source holds no text"):
        describe_work(dataclasses.replace(config, source=str(tmp_path / "empty.jsonl")))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    assert (
        "no document of the sample"
        in rows_of(dataclasses.replace(config, source=str(tmp_path / "blank.jsonl")))["time"]
    )


def test_the_output_of_the_job_is_a_preset_and_nothing_is_written(config: TokenizeConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(ROOT / "jobs/tokenize.py"), "--source", config.source, "--output", "out"]
    command += ["--vocab_size", "300", "--nodes", "2x3", "--dry_run"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=True).stdout
    assert yaml.safe_load(told)["tokenize"]["nodes"] == "2x3"
    assert "\n# source " in told and "trained on the sample" in told and "\n# cost  " in told
    assert sorted(tmp_path.rglob("*")) == before
