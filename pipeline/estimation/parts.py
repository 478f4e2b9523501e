"""Which parts of a source are sampled: at even distances by planned bytes, and never all of a large file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.sources.sources import Layout
from pipeline.sources.work_items import FileSlice, WorkItem

_PLACES = 4
_SMALL_FILES = ("txt", "py")  # files that are one document each


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is read at one place of the source."""

    item: WorkItem
    """Slices of one kind: a row group or the beginning of one, a range of bytes, a file, or several small ones."""
    planned_bytes: int
    """Bytes that the plan counts for it, if all of it is read."""
    wanted_bytes: int
    """Bytes after which reading may stop: fewer than planned where the file can only be read from its beginning."""
    records: int | None = None
    """Records in it; None where they are not known before they are read."""


@dataclass(frozen=True)
class _Unit:
    """The least that can be read by itself."""

    file_slice: FileSlice
    size_bytes: int
    records: int | None


def choose_parts(items: Sequence[WorkItem], layouts: Mapping[str, Layout], sample_bytes: int) -> list[Part]:
    """Parts at four even distances that are ``sample_bytes`` together, about; the whole source where it is no more.

    Args:
        items: the plan.
        layouts: name of a parquet file -> where its row groups are, and how many rows they have.
        sample_bytes: bytes as the plan counts them.
    """
    total = sum(item.size_bytes for item in items)
    windows = [(number * total // _PLACES, sample_bytes // _PLACES) for number in range(_PLACES)]
    if total <= sample_bytes:
        windows = [(0, total)]
    found: list[Part] = []
    position = 0
    for item in items:
        for file_slice in item.slices:
            if any(_overlap(window, position, file_slice.size_bytes) for window in windows):
                found += _parts_of(item, file_slice, layouts.get(file_slice.name), position, windows)
            position += file_slice.size_bytes
    return _joined(found)


def records_of(file_slice: FileSlice, layout: Layout | None) -> int | None:
    """How many records a slice has; None where it would have to be read for that."""
    if file_slice.max_documents is not None:
        return file_slice.max_documents
    if file_slice.kind in _SMALL_FILES:
        return 1
    return sum(unit.records or 0 for unit in _row_groups(file_slice, layout)) if layout is not None else None


def _overlap(window: tuple[int, int], start: int, size: int) -> int:
    return max(0, min(window[0] + window[1], start + size) - max(window[0], start))


def _row_groups(file_slice: FileSlice, layout: Layout) -> Iterator[_Unit]:
    """The row groups of a slice, by the layout of the whole file; the last may be cut by a limit."""
    left = file_slice.max_documents
    for group in range(*np.searchsorted(layout.bounds, [file_slice.start, file_slice.stop]).tolist()):
        rows = int(layout.documents[group]) if layout.documents is not None else 0
        kept = rows if left is None else min(rows, left)
        left = None if left is None else left - kept
        start, stop = int(layout.bounds[group]), int(layout.bounds[group + 1])
        one = dataclasses.replace(file_slice, start=start, stop=stop, max_documents=kept)
        yield _Unit(one, int(layout.sizes[group]), kept)


def _parts_of(
    item: WorkItem, file_slice: FileSlice, layout: Layout | None, position: int, windows: Sequence[tuple[int, int]]
) -> Iterator[Part]:
    if file_slice.is_range:
        for window in windows:
            if wanted := _overlap(window, position, file_slice.size_bytes):
                start = file_slice.start + max(0, window[0] - position)
                cut = dataclasses.replace(file_slice, start=start, stop=start + wanted, size_bytes=wanted)
                yield _part(item, cut, wanted)
        return
    units = [_Unit(file_slice, file_slice.size_bytes, 1 if file_slice.kind in _SMALL_FILES else None)]
    for unit in units if layout is None else _row_groups(file_slice, layout):
        wanted = sum(_overlap(window, position, unit.size_bytes) for window in windows)
        position += unit.size_bytes
        if wanted and layout is not None and unit.records:
            rows = max(1, unit.records * wanted // unit.size_bytes)
            planned = unit.size_bytes * rows // unit.records
            cut = dataclasses.replace(unit.file_slice, max_documents=rows, size_bytes=planned)
            yield _part(item, cut, planned, records=rows)
        elif wanted:
            yield _part(item, unit.file_slice, wanted, records=unit.records)


def _part(item: WorkItem, file_slice: FileSlice, wanted: int, records: int | None = None) -> Part:
    one = dataclasses.replace(item, slices=(file_slice,))
    return Part(item=one, planned_bytes=file_slice.size_bytes, wanted_bytes=wanted, records=records)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with neighbouring small files together, as the job reads them."""
    found: list[Part] = []
    for part in parts:
        if found and _is_whole_small_file(part) and _is_whole_small_file(found[-1]):
            last = found[-1]
            found[-1] = Part(
                item=dataclasses.replace(last.item, slices=(*last.item.slices, *part.item.slices)),
                planned_bytes=last.planned_bytes + part.planned_bytes,
                wanted_bytes=last.wanted_bytes + part.wanted_bytes,
                records=(last.records or 0) + (part.records or 0),
            )
        else:
            found.append(part)
    return found


def _is_whole_small_file(part: Part) -> bool:
    return part.item.slices[0].kind in _SMALL_FILES and part.wanted_bytes == part.planned_bytes
