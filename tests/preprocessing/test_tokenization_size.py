"""Size: 25,000 items, a 1 GB document, a 2 GB row group; memory and processes stay bounded.

Peaks of a process that encodes and writes items of 128 MB, 230 MB of it imports and kernels, measured on two busy
cores: the corpus of 249 MB 582 MB, a row group of 2.2 GB 1,113 MB, a line of JSON of 1 GB 2,554 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.verification import verify
from pipeline.preprocessing import tokenization
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.training import train_bpe
from tests.conftest import shared_folder
from tests.sources.test_reading_memory import GIGABYTE, block
from tests.support.fixtures import ROOT

ITEM_BYTES = 128_000_000


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([block(300_000)], 2000).save(path)
    return path


# ---- many items ------------------------------------------------------------------------------------------------------


class Watch:
    """The highest memory of this process and the most Ray processes below it, while a block runs."""

    def __enter__(self) -> Watch:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._end = threading.Event()
        self.growth_bytes = self.num_processes = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *values: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.5):
            self.growth_bytes = max(self.growth_bytes, self._process.memory_info().rss - self._before)
            names = []
            for child in self._process.children(recursive=True):
                try:
                    names.append(child.name())
                except psutil.NoSuchProcess:
                    continue
            self.num_processes = max(self.num_processes, sum(name.startswith("ray::") for name in names))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_items", [300, pytest.param(25_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_many_items(tmp_path: Path, tokenizer_path: Path, num_items: int) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(num_items):
        (source / f"{number:05d}.txt").write_text(f"This is text {number}, and it is short.\n")
    config = TokenizeConfig(
        source=str(source), tokenizer=str(tokenizer_path), item_bytes=1, val_fraction=0.1, num_workers=2
    )
    with Watch() as watch:
        summary = tokenization.tokenize(config, open_folder(tmp_path / "out"))
    figures = f"{watch.growth_bytes / 1e6:,.0f} MB, {watch.num_processes} processes, {summary.encode_seconds:.1f} s"
    print(f"{num_items:,} items: {figures}")  # noqa: T201
    assert (summary.num_items, summary.num_items_done) == (num_items, num_items)
    assert watch.growth_bytes < 1e9 and 1 <= watch.num_processes <= 8, figures
    assert summary.documents == num_items
    assert verify(tmp_path / "out") == []


# ---- memory of one worker --------------------------------------------------------------------------------------------


def write_alone(source: Path, output: Path, tokenizer: Path) -> dict[str, Any]:
    """Figures of a process that makes shards of a source."""
    command = [sys.executable, "-m", "tests.support.writing_process", *map(str, (source, output, tokenizer))]
    command.append(str(ITEM_BYTES))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    print(f"{source.name}: {figures}")  # noqa: T201
    return figures


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes go at once."""
    yield tmp_path / "out"
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size > 1_000_000:
            path.unlink()


@pytest.mark.slow
def test_memory_of_the_corpus(output: Path, tmp_path: Path) -> None:
    folder, corpus = shared_folder("gpt2"), shared_folder("corpus")
    Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt").save(tmp_path / "gpt2.json")
    figures = write_alone(corpus, output, tmp_path / "gpt2.json")
    assert figures["text_bytes"] > 200_000_000
    assert figures["peak_mb"] < 750, figures


@pytest.mark.slow
def test_memory_of_a_row_group_of_two_gigabytes(output: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    body = block(99_994, special="\n")
    texts = pa.array([f"{number:06}{body}" for number in range(1100)], pa.string())
    table = pa.table({"text": pa.chunked_array([texts] * 20)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10**6, compression="zstd")
    figures = write_alone(tmp_path / "a.parquet", output, tokenizer_path)
    assert (figures["items"], figures["text_bytes"]) == (1, 2_200_000_000)
    assert len(list(output.glob("train_000000*.bin"))) == 9  # a part ends behind 256 MB
    assert figures["peak_mb"] < 1500, figures


@pytest.mark.slow
def test_memory_of_a_document_of_one_gigabyte(output: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    text = block(1_000_000)
    part = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    repeats = (GIGABYTE - 1000) // len(part)
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"id": 1, "text": "')
        for _ in range(repeats):
            file.write(part)
        file.write(b'"}\n{"text": "after"}\n')
    figures = write_alone(tmp_path / "a.jsonl", output, tokenizer_path)
    assert figures["text_bytes"] == repeats * len(text.encode()) + len("after")
    assert figures["peak_mb"] < 3200, figures
