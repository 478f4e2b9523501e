"""Inputs that cannot be read: one sentence with file and place, or what came before the damage and a note."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.sources import column_chunks, sources
from pipeline.sources.readers import read_item
from tests.sources.test_readers import as_remote, open_local
from tests.support.texts import items_of, json_lines, mistake, read_items, write_parquet, zstd

RANDOM_TEXTS = [random.Random(i).randbytes(300).hex() for i in range(100)]


def damaged(content: bytes, kind: str) -> bytes:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "end cut": content[:-3],
        "middle": content[: middle - 50] + bytes(100) + content[middle + 50 :],
        "nonsense": b"something else altogether",
        "empty": b"",
    }[kind]


def read_what_is_left(source: Path, *, item_bytes: int = 1_000_000) -> tuple[list[str], list[dict[str, str]]]:
    """Texts before the damage and the notes of it; the same from files and from what was fetched."""
    texts, notes, _, _ = read_good_records(source, item_bytes=item_bytes, first_bad=None)
    return texts, notes


def read_good_records(
    source: Path, *, item_bytes: int = 1_000_000, first_bad: dict[str, str] | None
) -> tuple[list[str], list[dict[str, str]], dict[str, int], dict[str, str] | None]:
    """Texts, notes of damage, records left out by reason, and the first of them; from files and from what was fetched.

    ``first_bad``: empty, or None where a bad record is damage.
    """
    outcomes = []
    for remote in (False, True):
        notes: list[dict[str, str]] = []
        texts: list[str] = []
        skipped: Counter[str] = Counter()
        first = None if first_bad is None else dict(first_bad)
        items = items_of(source, item_bytes=item_bytes)
        for item in as_remote(items) if remote else items:
            table = column_chunks.fetch_column_chunks(item, open_local) if remote else None
            for array in read_item(item, skipped, table, notes, first):
                texts += array.to_pylist()
        reasons = [{**note, "reason": note["reason"].replace("s3://", "")} for note in notes]
        outcomes.append((texts, reasons, dict(skipped), first))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


# ---- compressed files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "end cut", "middle", "nonsense"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
def test_damaged_compressed_file(tmp_path: Path, suffix: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.json_lines._CHUNK_BYTES", 1000)
    text = json_lines(RANDOM_TEXTS)
    content = gzip.compress(text) if suffix.endswith("gz") else zstd(text)
    (tmp_path / f"a{suffix}").write_bytes(damaged(content, kind))
    (tmp_path / "b.txt").write_text("the next")
    sentence = mistake(tmp_path, kind=DamagedInputError)
    assert f"{tmp_path}/a{suffix} cannot be read, it may be damaged or truncated: " in sentence
    texts, notes = read_what_is_left(tmp_path)
    assert notes == [{"name": f"a{suffix}", "reason": sentence}]
    assert texts[-1] == "the next"
    assert texts[:-1] == RANDOM_TEXTS[: len(texts) - 1]
    if suffix == ".jsonl.gz" and kind in ("cut", "end cut"):
        assert len(texts) - 1 > (40 if kind == "cut" else 95)


# ---- parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "end cut", "middle", "nonsense", "empty"])
def test_damaged_parquet(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [*RANDOM_TEXTS], row_group_size=100)
    path.write_bytes(damaged(path.read_bytes(), kind))
    assert f"{path} cannot be read, it may be damaged or truncated: " in mistake(tmp_path, kind=DamagedInputError)


def test_what_comes_before_a_bad_page_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [*RANDOM_TEXTS], row_group_size=20, use_dictionary=False)
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(3).column(1)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)
    write_parquet(tmp_path / "b.parquet", ["the next"])
    for _ in range(2):
        texts, (note,) = read_what_is_left(tmp_path)
        assert texts == [*RANDOM_TEXTS[:60], "the next"]
        assert note["name"] == "a.parquet row groups 0-5"
        assert f"{path} cannot be read" in note["reason"]
    texts, (note,) = read_what_is_left(tmp_path, item_bytes=25 * 600)  # a row group is an item: the last is kept
    assert texts == [*RANDOM_TEXTS[:60], *RANDOM_TEXTS[80:], "the next"]
    assert note["name"] == "a.parquet row groups 3-4"


def test_pages_before_a_bad_one_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.readers._ROWS", 10)
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    write_parquet(path, [*RANDOM_TEXTS], row_group_size=100, data_page_size=1000, write_batch_size=5, **options)
    content = path.read_bytes()
    place = content.index(RANDOM_TEXTS[71].encode()) + 100
    path.write_bytes(content[:place] + b"x" + content[place + 1 :])
    texts, (_note,) = read_what_is_left(tmp_path)
    assert texts == RANDOM_TEXTS[:70]


def test_pages_with_checksums_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    write_parquet(path, [*RANDOM_TEXTS], row_group_size=50, **options)
    content = path.read_bytes()
    place = content.index(RANDOM_TEXTS[71].encode()) + 100
    path.write_bytes(content[:place] + b"x" + content[place + 1 :])  # still text, but another
    texts, (note,) = read_what_is_left(tmp_path)
    assert texts == RANDOM_TEXTS[:50]
    assert "checksum" in note["reason"].lower() or "crc" in note["reason"].lower()


def test_any_flipped_byte_is_a_text_or_a_sentence(tmp_path: Path) -> None:
    """No other exception, and no end of the process, which Arrow's metadata of a chunk can be."""
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", "two", None, "three" * 50] * 3, row_group_size=4)
    content = path.read_bytes()
    choose = random.Random(0)
    outcomes: Counter[str] = Counter()
    footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    for place in range(4, len(content)):
        changed = bytearray(content)
        bits = range(8) if place < len(content) - footer_bytes else (4, 5)  # in these a footer has lengths of lists
        changed[place] ^= 1 << choose.choice(bits)
        path.write_bytes(changed)
        outcomes[outcome(tmp_path)] += 1
    assert outcomes["read"] > 50
    assert outcomes["sentence"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_damage_of_a_footer_is_a_text_or_a_sentence(tmp_path: Path, seed: int) -> None:
    path, choose = tmp_path / "a.parquet", random.Random(seed)
    texts = [f"document {number}" for number in range(60)]
    table = pa.table({"list": [[text, text] for text in texts], "text": texts, "map": [{"a": 1, "b": [2]}] * 60})
    pq.write_table(table, path, row_group_size=20, write_page_checksum=seed > 0)
    content = path.read_bytes()
    start, stop = len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content) - 8
    for _ in range(2000):
        changed = bytearray(content)
        for _ in range(choose.choice([1, 2, 3, 8, 30])):
            changed[choose.randrange(start, stop)] = choose.randrange(256)
        path.write_bytes(changed)
        outcome(tmp_path)


def outcome(source: Path) -> str:
    """Of reading the file, and what was fetched of it."""
    try:
        items = items_of(source)
        read_items(items)
        for item in as_remote(items):
            list(read_item(item, Counter(), column_chunks.fetch_column_chunks(item, open_local)))
        column_chunks.needed_bytes(as_remote(items), open_local)
    except UserError:
        return "sentence"
    return "read"


def test_a_footer_that_is_wrong_when_it_is_fetched(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [*RANDOM_TEXTS])
    (tmp_path / "b.jsonl").write_bytes(json_lines(["the next"]))
    (item,) = as_remote(items_of(tmp_path))
    for content in (b"nonsense", b"", path.read_bytes()[:-10], b"PAR1" + (10**9).to_bytes(4, "little") + b"PAR1"):
        path.write_bytes(content)
        table = column_chunks.fetch_column_chunks(item, open_local)
        assert table["start"].to_pylist() == [column_chunks.DAMAGED, 0]
        with pytest.raises(DamagedInputError, match=r"a\.parquet cannot be read"):
            list(read_item(item, Counter(), table))
        notes: list[dict[str, str]] = []
        assert [array.to_pylist() for array in read_item(item, Counter(), table, notes)] == [["the next"]]
        assert [note["name"] for note in notes] == [item.slices[0].label]


def test_a_file_that_ends_early_when_it_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_bytes(json_lines(["one", "two"]))
    (item,) = as_remote(items_of(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_bytes(json_lines(["one"]))
    reasons = [data.decode() for data in column_chunks.fetch_column_chunks(item, open_local)["data"].to_pylist()]
    assert "a.txt cannot be read, it may be damaged or truncated: it ends at byte 1, not 6" in reasons[0]
    assert "b.jsonl cannot be read" in reasons[1]


def test_files_that_vanish_or_are_closed_to_us(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    (item,) = items_of(tmp_path)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DamagedInputError, match=r"a\.parquet is missing"):
        list(read_item(item, Counter()))
    assert column_chunks.fetch_column_chunks(as_remote_unseen(item), open_local)["start"].to_pylist() == [
        column_chunks.DAMAGED
    ]
    with pytest.raises(UserError, match="may not be read by this user") as raised, sources.reading("a.parquet"):
        raise PermissionError("no")
    assert not isinstance(raised.value, DamagedInputError)


def as_remote_unseen(item: Any) -> Any:
    Path(item.slices[0].path).write_bytes(b"")
    moved = as_remote([item])[0]
    Path(item.slices[0].path).unlink()
    return moved


# ---- lines and texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message", "kind"),
    [
        (b'{"text": "a"', "is no JSON object", DamagedInputError),
        (b"hello", "is no JSON object", DamagedInputError),
        (b'["a"]', "holds a JSON list; one object per line is expected", DamagedInputError),
        (b'{"body": "a", "id": 1}', "has no key 'text', only body, id; name one with --text_column", UserError),
        (b'{"text": 5}', "has a int under 'text', not text", UserError),
        (b'{"text": "a\xff"}', "is not UTF-8 text: byte 11 is 0xff", DamagedInputError),
        (b'{"text": "\\ud800"}', "", UserError),
        (b'{"text": "\\uD83D\\uDE42"}', "", UserError),
        (b"[" * 100_000, "is no JSON object", DamagedInputError),
    ],
)
@pytest.mark.parametrize("range_bytes", [7, 40, 4_000_000])
def test_bad_json_line(  # noqa: PLR0917
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: bytes,
    message: str,
    kind: type[UserError],
    range_bytes: int,
) -> None:
    monkeypatch.setattr(sources, "_RANGE_BYTES", range_bytes if len(line) < 100 else 10**6)
    before = json_lines(["one", "two"]) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(before + line + b"\n" + json_lines(["four"]))
    if not message:
        expected = "🙂" if b"D83D" in line else "\ufffd"
        assert read_what_is_left(tmp_path) == (["one", "two", expected, "four"], [])
        return
    assert f"line 4 of {tmp_path}/a.jsonl {message}" in mistake(tmp_path, kind=kind)
    (item, *others) = items_of(tmp_path, item_bytes=10)
    if others:
        with pytest.raises(kind) as raised:
            read_items([item, *others])
        assert f"the line at byte {len(before)} of {tmp_path}/a.jsonl {message}" in str(raised.value)
    if kind is DamagedInputError:
        texts, (note,) = read_what_is_left(tmp_path)
        assert texts == ["one", "two"]
        assert f"line 4 of {tmp_path}/a.jsonl {message}" in note["reason"]
    texts, notes, skipped, first = read_good_records(tmp_path, first_bad={})
    assert (texts, notes) == (["one", "two", "four"], [])
    ((reason, sentence),) = (first or {}).items()
    assert skipped == {reason: 1} and f"line 4 of a.jsonl {message}" in sentence


def test_bad_line_of_a_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(["one", "two"]) + b"three\n" + json_lines(["4"])))
    assert "line 3 of " in mistake(tmp_path, kind=DamagedInputError)
    texts, (note,) = read_what_is_left(tmp_path)
    assert (texts, note["name"]) == (["one", "two"], "a.jsonl.gz")


def test_the_place_of_a_line_far_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_RANGE_BYTES", 100_000)
    good = json_lines(["z" * 1000] * 400)
    (tmp_path / "a.jsonl").write_bytes(good + b"bad\n")
    texts, (note,) = read_what_is_left(tmp_path, item_bytes=100_000)
    assert len(texts) == 400
    assert f"the line at byte {len(good):,} of {tmp_path}/a.jsonl is no JSON object" in note["reason"]
    assert len(good) > 400_000


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("żółw".encode() + b"\xe9")
    assert mistake(tmp_path, kind=DamagedInputError) == f"{tmp_path}/a.txt is not UTF-8 text: byte 7 is 0xe9"
    (tmp_path / "b.txt").write_text("the next")
    assert read_what_is_left(tmp_path)[0] == ["the next"]


@pytest.mark.parametrize("dictionary", [False, True])
def test_rows_that_are_not_utf8(tmp_path: Path, dictionary: bool) -> None:
    column = pa.array([b"one", b"two", None, b"f\xffur", b"five"], pa.binary()).view(pa.string())
    options = {"row_group_size": 2, "use_dictionary": dictionary, "write_statistics": False}
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", **options)
    sentence = f"row 3 of {tmp_path}/a.parquet is not UTF-8 text: byte 1 is 0xff"
    assert mistake(tmp_path, kind=DamagedInputError) == sentence
    assert read_what_is_left(tmp_path) == (
        ["one", "two"],
        [{"name": "a.parquet row groups 0-3", "reason": sentence}],
    )
    assert read_good_records(tmp_path, first_bad={}) == (
        ["one", "two", "five"],
        [],
        {"null": 1, "not UTF-8": 1},
        {"not UTF-8": "row 3 of a.parquet is not UTF-8 text: byte 1 is 0xff"},
    )
