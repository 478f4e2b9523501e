"""jobs/tokenize.py from raw parquet to shards in one command: rules, masking, near-duplicates, decontamination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.dataset.manifest import Manifest
from tests.jobs.test_jobs import job
from tests.support.fixtures import contents
from tests.support.planted_corpus import FLAGS, planted_corpus


def flags_of(folder: Path, **more: Any) -> list[str]:
    paths = {"source": folder / "raw", "decontaminate": folder / "questions.jsonl", "output": folder / "out"}
    sizes = {"vocab_size": 300, "item_bytes": 12_000, "num_workers": 2, "val_fraction": 0.1}
    return [*FLAGS, *(f"--{name}={value}" for name, value in {**paths, **sizes, **more}.items())]


def test_raw_parquet_to_shards_in_one_command(tmp_path: Path) -> None:
    corpus = planted_corpus()
    corpus.write(tmp_path)
    first = job("tokenize.py", *flags_of(tmp_path), cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "tokenize: done\n" in first.stdout
    assert "7 documents hold a question; contaminated.jsonl lists them" in first.stdout

    manifest = Manifest.load(tmp_path / "out")
    assert manifest.skipped == corpus.skipped
    assert manifest.documents("train") + manifest.documents("val") == len(corpus.kept) == 60
    assert manifest.documents("val") > 0
    assert len(manifest.inputs) == 3 and len(manifest.document_lengths) > 5
    settings = manifest.settings
    assert settings["filters"] == ["gopher", "c4", "fineweb"] and settings["mask_personal_data"] is True
    assert settings["dedup"] == "minhash" and settings["evaluation_sets"][0].startswith("questions.jsonl ")
    lines = [json.loads(line) for line in (tmp_path / "out/contaminated.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [question for _, question in corpus.listed]

    before = contents(tmp_path / "out")
    deeper = {name.split("/")[1] for name in before if name.startswith("items/") and name.count("/") > 1}
    assert deeper == {"contaminated"}, "what the search for copies has left is gone"
    second = job("tokenize.py", *flags_of(tmp_path), cwd=tmp_path)
    assert second.returncode == 0 and "tokenize: done before\n" in second.stdout
    assert contents(tmp_path / "out") == before
