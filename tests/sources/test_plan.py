"""Plans: every unit in one item, in order, parts of like size; limits to the record; samples; plans on disk."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote.remote_file import RemoteFile
from pipeline.sources import sources
from pipeline.sources.plan import fetch_units, load_plan, make_plan, sample_plan, save_plan
from pipeline.sources.sources import Layout, find
from pipeline.sources.work_items import FileSlice, WorkItem
from tests.support.texts import TEXTS, items_of, json_lines, read_items, write_parquet, zstd

Sizes = list[list[tuple[int, int]]]
SIZES = st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=25), min_size=1, max_size=12)
"""Per file, per row group: (bytes of text, rows)."""
LIMITS = st.integers(1, 150)


def layouts_of(files: Sizes) -> list[Layout]:
    return [layout_of(f"{number:02}.parquet", units) for number, units in enumerate(files)]


def layout_of(name: str, units: list[tuple[int, int]]) -> Layout:
    file = RemoteFile(url=f"s3://bucket/{name}", name=name, size_bytes=1000, version=f"etag:{name}")
    total = sum(size for size, _ in units)
    return Layout(
        whole=FileSlice(name=name, path="", kind="parquet", version="v", size_bytes=total, file=file),
        bounds=np.arange(len(units) + 1),
        sizes=np.array([size for size, _ in units], np.int64),
        documents=np.array([rows for _, rows in units], np.int64),
    )


def plan_of(files: Sizes, item_bytes: int, **limits: Any) -> list[WorkItem]:
    return make_plan(layouts_of(files), text_column="text", item_bytes=item_bytes, **limits)


def units_of(items: list[WorkItem]) -> list[tuple[int, int]]:
    """(file, row group) of every row group read."""
    return [
        (int(file_slice.name[:2]), group)
        for item in items
        for file_slice in item.slices
        for group in range(file_slice.start, file_slice.stop)
    ]


def all_units(files: Sizes) -> list[tuple[int, int]]:
    return [(number, group) for number, units in enumerate(files) for group in range(len(units))]


def has_text(files: Sizes) -> bool:
    return any(size for units in files for size, _ in units)


# ---- dividing --------------------------------------------------------------------------------------------------------


@given(files=SIZES.filter(has_text), item_bytes=LIMITS)
def test_every_row_group_is_in_one_item_in_order(files: Sizes, item_bytes: int) -> None:
    items = plan_of(files, item_bytes)
    assert units_of(items) == all_units(files)
    assert [item.index for item in items] == list(range(len(items)))
    for item in items:
        sizes = [
            size
            for file_slice in item.slices
            for size, _ in files[int(file_slice.name[:2])][file_slice.start : file_slice.stop]
        ]
        assert item.size_bytes == sum(sizes)
        assert item.size_bytes <= item_bytes or len(sizes) == 1


@given(files=SIZES.filter(has_text), item_bytes=LIMITS)
def test_an_item_is_a_part_of_one_file_or_whole_files(files: Sizes, item_bytes: int) -> None:
    items = plan_of(files, item_bytes)
    whole = [
        all(file_slice.stop - file_slice.start == len(files[int(file_slice.name[:2])]) for file_slice in item.slices)
        for item in items
    ]
    assert all(is_whole or len(item.slices) == 1 for is_whole, item in zip(whole, items, strict=True))
    for (is_whole, item), (is_next_whole, next_item) in itertools.pairwise(zip(whole, items, strict=True)):
        if is_whole and is_next_whole:  # they would not have fitted together
            assert item.size_bytes + next_item.slices[0].size_bytes > item_bytes


def fewest_parts(sizes: list[int], limit: int) -> tuple[int, int]:
    """By trying all ways: the fewest parts of at most ``limit`` (or one unit), and their least largest size."""
    best: dict[int, list[tuple[int, int]]] = {0: [(0, 0)]}  # units divided so far -> (parts, largest of several units)
    for end in range(1, len(sizes) + 1):
        ways = []
        for begin in range(end):
            total = sum(sizes[begin:end])
            if total <= limit or end - begin == 1:
                ways += [(parts + 1, max(largest, total if total <= limit else 0)) for parts, largest in best[begin]]
        fewest: dict[int, int] = {}
        for parts, largest in ways:
            fewest[parts] = min(largest, fewest.get(parts, largest))
        best[end] = list(fewest.items())
    return min(best[len(sizes)])


@given(sizes=st.lists(st.integers(0, 60), min_size=2, max_size=12), item_bytes=LIMITS)
def test_parts_of_a_file_are_few_and_alike(sizes: list[int], item_bytes: int) -> None:
    if sum(sizes) <= item_bytes:
        return
    items = plan_of([[(size, 1) for size in sizes]], item_bytes)
    largest = max([item.size_bytes for item in items if item.size_bytes <= item_bytes], default=0)
    fewest, least = fewest_parts(sizes, item_bytes)
    assert len(items) == fewest
    assert least <= largest <= least + item_bytes // 128, "sizes are equalised to a 128th"


def test_parts_are_alike_up_to_a_128th() -> None:
    items = plan_of([[(size, 1) for size in (7, 60, 60, 1, 52, 60)]], 144)
    assert [item.size_bytes for item in items] == [128, 112], "127 and 113 are nearer to each other"


def test_parts_of_a_file_of_equal_row_groups() -> None:
    items = plan_of([[(3, 1)] * 700], 150)  # 14 times 150 makes 2100
    assert [item.size_bytes for item in items] == [150] * 14
    items = plan_of([[(3, 1)] * 701], 150)
    assert len(items) == 15
    assert max(item.size_bytes for item in items) == 141
    assert items[0].label == "00.parquet row groups 0-47"
    assert plan_of([[(3, 1), (3, 1)], [(3, 1)]], 9)[0].label == "00.parquet row groups 0-2 to 01.parquet row groups 0-1"


def test_a_source_without_text() -> None:
    sources: list[Sizes] = [[[]], [[(0, 0)], [(0, 3)]]]
    for files in sources:
        with pytest.raises(UserError, match="the source holds no text"):
            plan_of(files, 10)


# ---- limits ----------------------------------------------------------------------------------------------------------


def records_of(items: list[WorkItem], files: Sizes) -> int:
    total = 0
    for file_slice in (file_slice for item in items for file_slice in item.slices):
        rows = sum(rows for _, rows in files[int(file_slice.name[:2])][file_slice.start : file_slice.stop])
        assert file_slice.max_documents is None or file_slice.max_documents < rows  # given only where it cuts something
        total += rows if file_slice.max_documents is None else file_slice.max_documents
    return total


@given(files=SIZES, item_bytes=LIMITS, limit=st.integers(1, 300))
def test_limit_documents_is_exact(files: Sizes, item_bytes: int, limit: int) -> None:
    files = [[(10 + size, rows) for size, rows in units] for units in files]
    if not has_text(files):
        return
    try:
        items = plan_of(files, item_bytes, limit_documents=limit)
    except UserError:
        pytest.fail("a limit never leaves nothing")
    assert records_of(items, files) == min(limit, sum(rows for units in files for _, rows in units))
    assert units_of(items) == all_units(files)[: len(units_of(items))]
    cut = [
        file_slice.max_documents for item in items for file_slice in item.slices if file_slice.max_documents is not None
    ]
    assert len(cut) <= 1


@given(files=SIZES.filter(has_text), item_bytes=LIMITS, limit=st.integers(1, 600))
def test_limit_bytes_ends_with_the_row_group_in_which_it_is_reached(files: Sizes, item_bytes: int, limit: int) -> None:
    sizes = [size for units in files for size, _ in units]
    ends = list(itertools.accumulate(sizes))
    expected = next((number + 1 for number, end in enumerate(ends) if end >= limit), len(sizes))
    assert units_of(plan_of(files, item_bytes, limit_bytes=limit)) == all_units(files)[:expected]


def test_nothing_behind_a_limit_is_asked_for() -> None:
    def layouts() -> Any:
        yield layout_of("00.parquet", [(10, 5)] * 3)
        pytest.fail("the plan was made already")

    every_limit: list[dict[str, Any]] = [
        {"limit_documents": 15},
        {"limit_bytes": 30},
        {"limit_documents": 1},
        {"limit_bytes": 1},
    ]
    for limits in every_limit:
        make_plan(layouts(), text_column="text", item_bytes=100, **limits)


@settings(max_examples=50)
@given(
    lines=st.lists(st.integers(-3, 40), max_size=25),
    limit=st.integers(1, 25),
    range_bytes=st.integers(1, 90),
    packed=st.booleans(),
    is_ended=st.booleans(),
)
def test_limit_documents_counts_lines(  # noqa: PLR0917
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[int],
    limit: int,
    range_bytes: int,
    packed: bool,
    is_ended: bool,
) -> None:
    """Negative lengths stand for blank lines, which are no records; three files, the second one of lines."""
    folder = tmp_path_factory.mktemp("lines")
    texts = [f"{number}{'z' * length}" for number, length in enumerate(lines) if length >= 0]
    content = b"\n".join(
        json.dumps({"text": f"{number}{'z' * length}"}).encode() if length >= 0 else b" " * -length
        for number, length in enumerate(lines)
    )
    content += b"\n" if is_ended else b""
    (folder / "a.txt").write_text("first")
    (folder / ("b.jsonl.gz" if packed else "b.jsonl")).write_bytes(gzip.compress(content) if packed else content)
    (folder / "c.txt").write_text("last")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_RANGE_BYTES", range_bytes)
        patch.setattr("pipeline.sources.json_lines._CHUNK_BYTES", 16)
        for item_bytes in (1, 10_000):
            items = make_plan(
                find(str(folder)).layouts("text"), text_column="text", item_bytes=item_bytes, limit_documents=limit
            )
            assert read_items(items) == ["first", *texts, "last"][:limit]


def test_limit_documents_of_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [*TEXTS, None, " ", "more"], row_group_size=4)
    everything = [*TEXTS, None, " ", "more"]
    for limit in range(1, 12):
        layouts = find(str(tmp_path)).layouts("text")
        items = make_plan(layouts, text_column="text", item_bytes=1, limit_documents=limit)
        skipped: Counter[str] = Counter()
        kept = [text for text in everything[:limit] if text and text.strip()]
        assert read_items(items, skipped=skipped) == kept
        assert len(kept) + skipped.total() == min(limit, 9)


def test_lines_that_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(json_lines(TEXTS))[:-9])
    with pytest.raises(DamagedInputError, match=r"a\.jsonl\.zst cannot be read"):
        make_plan(find(str(tmp_path)).layouts("text"), text_column="text", item_bytes=10, limit_documents=50)


# ---- samples ---------------------------------------------------------------------------------------------------------


@given(files=SIZES.filter(has_text), item_bytes=LIMITS, sample_bytes=st.integers(1, 800))
def test_samples_are_bounded(files: Sizes, item_bytes: int, sample_bytes: int) -> None:
    items = sample_plan(layouts_of(files), text_column="text", item_bytes=item_bytes, sample_bytes=sample_bytes)
    units = units_of(items)
    assert units == sorted(set(units))
    assert sum(item.size_bytes for item in items) <= sample_bytes or len(units) == 1
    for item in items:
        num_units = sum(file_slice.stop - file_slice.start for file_slice in item.slices)
        assert item.size_bytes <= item_bytes or num_units == 1
        names = {file_slice.name for file_slice in item.slices}
        assert len(names) == 1 or all(
            file_slice.stop - file_slice.start == len(files[int(file_slice.name[:2])]) for file_slice in item.slices
        )
    if sum(size for file in files for size, _ in file) <= sample_bytes:
        assert items == plan_of(files, item_bytes)


def test_samples_are_spread_over_the_whole_source() -> None:
    files = [[(10, 1)] * 100 for _ in range(10)]
    items = sample_plan(layouts_of(files), text_column="text", item_bytes=1000, sample_bytes=50)
    assert units_of(items) == [(1, 99), (3, 99), (5, 99), (7, 99), (9, 99)]
    items = sample_plan(layouts_of(files), text_column="text", item_bytes=1000, sample_bytes=1000)
    assert [len(item.slices) for item in items] == [10] * 10  # an item per file, however far apart its parts are


# ---- plans on disk and keys ------------------------------------------------------------------------------------------


@given(files=SIZES.filter(has_text), item_bytes=LIMITS, limit=st.one_of(st.none(), st.integers(1, 50)))
def test_a_plan_survives_its_file(files: Sizes, item_bytes: int, limit: int | None) -> None:
    limits = {"limit_documents": limit} if limit else {}
    try:
        items = plan_of(files, item_bytes, **limits)
    except UserError:
        return  # the first rows may have no text
    content = save_plan(items)
    assert load_plan(content) == items
    assert load_plan(save_plan(items[1:])) == items[1:]
    assert all(load_plan(save_plan([item])) == [item] for item in items)
    assert len(content.splitlines()) == 1 + len(items) + len(
        {file_slice.name for item in items for file_slice in item.slices}
    )


def test_a_plan_of_local_files_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "ż ½.jsonl").write_bytes(json_lines(TEXTS))
    write_parquet(tmp_path / "a.parquet", [*TEXTS])
    items = items_of(tmp_path, item_bytes=3000)
    assert load_plan(save_plan(items)) == items


def test_a_plan_that_is_damaged() -> None:
    content = save_plan(plan_of([[(10, 1)] * 3], 10))
    for damaged in (b"", b"{}\n", b"[1]\n", content[:-10], content[: content[:-2].rindex(b"\n") + 1], content + b"7\n"):
        with pytest.raises(UserError, match="the plan is damaged or of another version"):
            load_plan(damaged)
    with pytest.raises(UserError, match="another version"):
        load_plan(content.replace(b"plan 1", b"plan 2"))


def test_items_of_one_remote_file_are_fetched_together(tmp_path: Path) -> None:
    items = plan_of([[(10, 1)] * 3, [(1, 1)], [(2, 1)], [(10, 1)] * 2], 10)
    assert [[item.index for item in unit] for unit in fetch_units(items)] == [[0, 1, 2], [3], [4, 5]]
    assert [[item.index for item in unit] for unit in fetch_units(items[2:])] == [[2], [3], [4, 5]]
    write_parquet(tmp_path / "a.parquet", [*TEXTS])
    assert [len(unit) for unit in fetch_units(items_of(tmp_path, item_bytes=1))] == [1, 1, 1]


def test_a_plan_is_the_same_on_every_machine_but_knows_changes(tmp_path: Path) -> None:
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "a.parquet", [*TEXTS])
        os.utime(tmp_path / folder / "a.parquet", ns=(0, 12345))
        (item,) = items_of(tmp_path / folder)
        keys.append((item.key, item.label, [entry.manifest_entry() for entry in find(str(tmp_path / folder)).inputs]))
    assert keys[0] == keys[1]
    assert str(tmp_path) not in json.dumps(keys)
    file_slice = dataclasses.replace(item.slices[0], max_documents=1)
    assert dataclasses.replace(item, slices=(file_slice,)).key != item.key
    os.utime(tmp_path / "there" / "a.parquet", ns=(0, 12346))
    assert items_of(tmp_path / "there")[0].key != keys[0][0]
