"""Samples of real files: what is in them, what is read of large ones, and what cannot be read."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import TokenizeConfig
from pipeline.errors import UserError
from pipeline.estimation.parts import Part, choose_parts
from pipeline.estimation.sampling import SourceSample, take_sample
from pipeline.filters.rules import Rules
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import find
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.file_server import FileServer, running_files

LARGE_BYTES = 16_000_000
MOST_READ_BYTES = 11_000_000
"""Of a large file: the parts, what is decoded ahead of them, and the first array once more, before time is taken."""


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> Tokenizer:
    return bpe_training.train_bpe(documents, 300)


@pytest.fixture(scope="module")
def large_texts() -> list[str]:
    """16 MB of random letters."""
    choose = random.Random(3)
    return ["".join(choose.choices("abcdefgh ", k=2000)) for _ in range(LARGE_BYTES // 2000)]


def parts_of(source: str, sample_bytes: int, **changes: Any) -> list[Part]:
    layouts = list(find(source).layouts("text", has_separator=False))
    items = make_plan(layouts, text_column="text", item_bytes=4_000_000, **changes)
    by_name = {layout.whole.name: layout for layout in layouts if layout.whole.kind == "parquet"}
    return choose_parts(items, by_name, sample_bytes)


def sampled(
    source: Path | str, tokenizer: Tokenizer | None, sample_bytes: int = 1_600_000, **changes: Any
) -> SourceSample:
    config = TokenizeConfig(source=str(source), **{"val_fraction": 0.0} | changes)
    return take_sample(parts_of(str(source), sample_bytes), config, tokenizer=tokenizer)


def bytes_read() -> int:
    """What this process has read so far, from wherever."""
    return int(Path("/proc/self/io").read_text().split()[1])


def write(path: Path, texts: list[str]) -> Path:
    """The texts in a file of the kind that its name says."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=2000, compression="none", use_dictionary=False)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), 1))
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as stream:
            stream.write_table(pa.table({"text": texts}), max_chunksize=500)
    else:
        path.write_text(" ".join(texts) if path.suffix == ".txt" else lines)
    return path


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_a_small_source_is_sampled_whole(corpus: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    found = sampled(corpus, tokenizer)
    assert found.documents == len(documents) == found.worked_documents == found.kept_documents
    assert found.text_bytes == sum(len(text.encode()) for text in documents) == found.kept_bytes
    assert found.unread == {"null": 1, "blank": 1} and not found.problems
    assert found.tokens == sum(1 + len(tokenizer.encode(text)) for text in documents)
    assert found.planned_bytes == sum(part.planned_bytes for part in parts_of(str(corpus), 1_600_000))
    assert found.timings.keys() == {"reading", "encoding"} and not found.is_trained


def test_rules_and_masking_are_those_of_the_job(corpus: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    rules = Rules(groups=("gopher",), bounds=("gopher.min_words=20", "gopher.min_stop_words=off"))
    found = sampled(corpus, tokenizer, filters=("gopher",), filter_bounds=rules.bounds, dedup="exact")
    decisions = [rules.apply(text) for text in documents]
    kept = [text for text, broken in decisions if broken is None]
    assert 0 < len(kept) < len(documents) and found.kept_documents == len(kept)
    assert found.dropped == Counter(broken for _, broken in decisions if broken)
    assert found.tokens == sum(1 + len(tokenizer.encode(text)) for text in kept)
    assert found.timings.keys() == {"reading", "rules", "copies", "encoding"}


def test_a_tokenizer_is_trained_where_none_is_given(corpus: Path, documents: list[str]) -> None:
    found = sampled(corpus, None, vocab_size=300)
    trained = bpe_training.train_bpe(documents, 300)
    assert found.is_trained and found.tokens == sum(1 + len(trained.encode(text)) for text in documents)


def test_records_of_a_large_parquet_file_are_counted(
    large_texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Four times 100 rows of 2,000 bytes, from the beginning of the row groups that hold 0, 4, 8 and 12 MB."""
    path = write(tmp_path / "large.parquet", large_texts)
    parts = parts_of(str(path), 800_000)
    assert [part.item.slices[0].start for part in parts] == [0, 1, 2, 3]
    found = sampled(path, tokenizer, 800_000)
    rows = [part.records or 0 for part in parts]
    assert found.documents == sum(rows) and all(98 <= count <= 100 for count in rows)
    expected = [
        text
        for part, count in zip(parts, rows, strict=True)
        for text in large_texts[part.item.slices[0].start * 2000 :][:count]
    ]
    assert found.tokens == sum(1 + len(tokenizer.encode(text)) for text in expected)
    assert found.planned_bytes / 800_000 == pytest.approx(1, abs=0.02)


def test_limits_bound_the_sample(large_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "large.parquet", large_texts)
    parts = parts_of(str(path), 1_600_000, limit_documents=2005)
    assert sum(part.records or 0 for part in parts) <= 2005
    parts = parts_of(str(path), 100_000_000, limit_documents=2005)
    assert [part.records for part in parts] == [2000, 5]
    assert take_sample(parts, TokenizeConfig(source=str(path)), tokenizer=tokenizer).documents == 2005


# ---- large files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.csv", "a.arrow", "a.txt"])
def test_a_large_file_is_never_read_whole(
    name: str, large_texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / name, large_texts)
    parts = parts_of(str(path), 1_600_000)
    config = TokenizeConfig(source=str(path), val_fraction=0.0)
    take_sample(parts, config, tokenizer=tokenizer)  # loads and compiles what is read from other files
    before = bytes_read()
    found = take_sample(parts, config, tokenizer=tokenizer)
    assert bytes_read() - before < min(MOST_READ_BYTES, 0.8 * path.stat().st_size)
    assert 1_000_000 < found.text_bytes < 9_000_000 and found.worked_bytes == found.text_bytes
    whole = found.text_bytes / found.planned_bytes * sum(item.size_bytes for item in _items(path))
    assert whole == pytest.approx(LARGE_BYTES, rel=0.1)


def _items(path: Path) -> list[Any]:
    return make_plan(find(str(path)).layouts("text"), text_column="text", item_bytes=4_000_000)


def test_no_array_is_begun_after_the_time(large_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", large_texts)
    config = TokenizeConfig(source=str(path), val_fraction=0.0)
    parts = parts_of(str(path), 20_000_000)
    found = take_sample(parts, config, tokenizer=tokenizer, seconds=0.0)
    assert 0 < found.text_bytes <= 2_000_000 and found.worked_bytes == found.text_bytes
    assert found.text_bytes / found.planned_bytes == pytest.approx(1, abs=0.5) and found.timings["encoding"].seconds > 0


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, documents: list[str]) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    write(folder / "a.jsonl", documents[:200])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 2000)[:-20])
    return folder


def test_a_broken_file_is_named_and_the_rest_is_sampled(
    broken: Path, documents: list[str], tokenizer: Tokenizer
) -> None:
    found = sampled(broken, tokenizer)
    assert len(found.problems) == 1 and "b.jsonl.gz cannot be read, it may be damaged" in found.problems[0]
    assert found.documents >= 200 and found.tokens > sum(len(tokenizer.encode(text)) for text in documents[:200])


def test_what_the_settings_leave_out_is_no_problem(broken: Path, tokenizer: Tokenizer) -> None:
    found = sampled(broken, tokenizer, skip_bad_files=True)
    assert not found.problems and [entry["name"] for entry in found.damaged] == ["b.jsonl.gz"]


def test_only_broken_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    found = sampled(tmp_path / "a.jsonl", tokenizer)
    assert not found.documents and "a.jsonl" in found.problems[0]
    left = sampled(tmp_path / "a.jsonl", tokenizer, skip_bad_records=True)
    assert left.unread == {"not JSON": 1} and not left.problems


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="the source holds no text"):
        parts_of(str(tmp_path / "a.jsonl"), 100)


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(large_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("server")
    names = ["a.jsonl", "a.parquet", "a.jsonl.gz"]
    with running_files({name: write(folder / name, large_texts).read_bytes() for name in names}) as files:
        yield files


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_small_ranges_of_a_remote_file_are_fetched(
    name: str, server: FileServer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    server.traffic.forget()
    found = sampled(f"{server.url}/{name}", tokenizer)
    (tmp_path / name).write_bytes(server.files[name])
    local = sampled(tmp_path / name, tokenizer)
    assert (found.documents, found.tokens, found.planned_bytes) == (local.documents, local.tokens, local.planned_bytes)
    assert 500_000 < found.download_bytes <= server.traffic.asked_bytes() < MOST_READ_BYTES
    assert found.download_seconds > 0 == local.download_seconds


def test_a_server_that_goes_away_is_named(server: FileServer, tokenizer: Tokenizer) -> None:
    parts = parts_of(f"{server.url}/a.jsonl", 1_600_000)
    server.traffic.fail(status=404, times=10**6)
    try:
        found = take_sample(parts, TokenizeConfig(source=f"{server.url}/a.jsonl"), tokenizer=tokenizer)
    finally:
        server.traffic.forget()
    assert not found.documents and "a.jsonl" in found.problems[0]
