"""jobs/tokenize.py from raw parquet to shards in one command: rules, masking, near-duplicates, decontamination."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.manifest import Manifest
from tests.jobs.test_jobs import job
from tests.support.fixtures import contents
from tests.support.killed_job import KillableJob
from tests.support.planted_corpus import FLAGS, planted_corpus

OWN = {"summary.json", "mlflow_run.json"}
"""Files that differ from run to run."""

MOMENTS: list[dict[str, Any]] = [
    {"moment": "write plan.jsonl"},
    {"appeared": "items/signatures/*"},
    {"appeared": "items/pairs/*"},
    {"appeared": "items/duplicates/*"},
    {"appeared": "items/contaminated/*"},
    {"appeared": "train_*.bin"},
    {"moment": "write contaminated.jsonl"},
    {"moment": "write manifest.json"},
]


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the source, and what a run that nobody disturbs writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    planted_corpus().write(folder)
    done = job("tokenize.py", *flags_of(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, lasting(folder / "out")


def lasting(output: Path) -> dict[str, str]:
    """The files whose bytes are the same for every run."""
    return {name: digest for name, digest in contents(output).items() if name not in OWN}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "".join(moment.values()).replace("/", "-"))
def test_a_driver_that_is_killed_in_every_stage(
    undisturbed: tuple[Path, dict[str, str]], tmp_path: Path, moment: dict[str, Any]
) -> None:
    """By SIGKILL, when files of a stage have appeared or as it writes one itself."""
    folder, expected = undisturbed
    output = tmp_path / "out"
    killable = KillableJob(name="tokenize.py", flags=flags_of(folder, output=output), home=tmp_path, output=output)
    killed = killable.run(signal.SIGKILL, **moment)
    assert killed.was_told and killed.code == -signal.SIGKILL, killed.output[-3000:]
    ended = killable.run()
    assert ended.code == 0 and "tokenize: done\n" in ended.output, ended.output[-3000:]
    assert lasting(output) == expected
