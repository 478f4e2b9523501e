"""From layouts to work items: a function of the input and of ``item_bytes`` alone, whatever the cluster.

An item is a part of one file, a file above ``item_bytes`` being divided into parts of about equal size, or whole small
files together; never a mixture. A plan is written down as lines of JSON: FineWeb whole, 350,000 items, takes 23 MB.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.remote.remote_file import RemoteFile, stored_url
from pipeline.sources import documents, json_lines, tables
from pipeline.sources.compressions import unpacked
from pipeline.sources.sources import Layout
from pipeline.sources.work_items import AS_THEY_ARE, DocumentRules, FileSlice, WorkItem, open_slice, reading

_FORMAT = "gpt-2.5 plan 1"
_FILE_FIELDS = ("name", "path", "kind", "version")  # of a slice, the same for all slices of a file
_RANGE_FIELDS = ("start", "stop", "size_bytes", "max_documents")
_PRECISION = 128  # sizes of parts are equalised to a 128th


def make_plan(
    layouts: Iterable[Layout],
    *,
    text_column: str,
    item_bytes: int,
    limit_documents: int | None = None,
    limit_bytes: int | None = None,
    rules: DocumentRules = AS_THEY_ARE,
) -> list[WorkItem]:
    """The work items of a source, in order.

    ``limit_documents``: records at most, counted before any is skipped: parquet rows, lines that are not blank, files.
    Lines are counted by reading, from the front and no further than needed. ``limit_bytes`` of text, about: the row
    group or range of bytes in which it is reached is the last. No layout behind a limit is asked for.

    Raises UserError where there is no text at all, DamagedInputError for lines that cannot be counted.
    """
    groups = _Groups(item_bytes)
    for layout in _limited(layouts, limit_documents, limit_bytes, rules):
        if int(layout.sizes.sum()) > item_bytes and len(layout.sizes) > 1:
            for part in _parts(layout, _divide(layout.sizes.tolist(), item_bytes)):
                groups.add([part])
        elif len(layout.sizes):
            groups.add_file(*_parts(layout, [0, len(layout.sizes)]))
    return groups.items(text_column, rules)


def sample_plan(
    layouts: Iterable[Layout],
    *,
    text_column: str,
    item_bytes: int,
    sample_bytes: int,
    rules: DocumentRules = AS_THEY_ARE,
) -> list[WorkItem]:
    """Row groups, ranges and files at even distances over the whole source, ``sample_bytes`` together at most.

    At least one; all of it, as ``make_plan`` does, where it is no more. Takes 24 bytes of memory per row group.
    """
    layouts = [layout for layout in layouts if len(layout.sizes)]
    total_bytes = sum(int(layout.sizes.sum()) for layout in layouts)
    if total_bytes <= sample_bytes:
        return make_plan(layouts, text_column=text_column, item_bytes=item_bytes, rules=rules)
    groups = _Groups(item_bytes)
    for layout, units in _spread(layouts, total_bytes, sample_bytes):
        if len(units) == len(layout.sizes) and int(layout.sizes.sum()) <= item_bytes:
            groups.add_file(*_parts(layout, [0, len(units)]))
            continue
        edges = _fill(list(itertools.accumulate(layout.sizes[units].tolist(), initial=0)), item_bytes)
        for begin, end in itertools.pairwise(edges):
            groups.add([part for run in _runs(units[begin:end]) for part in _parts(layout, run)])
    return groups.items(text_column, rules)


def fetch_units(items: Iterable[WorkItem]) -> list[list[WorkItem]]:
    """Groups of neighbouring items that read the same remote file; any other item is a group of its own."""
    units: list[list[WorkItem]] = []
    for item in items:
        file = item.slices[0].file
        if file is not None and units and units[-1][-1].slices[-1].file == file:
            units[-1].append(item)
        else:
            units.append([item])
    return units


# ---- a plan on disk --------------------------------------------------------------------------------------------------


def save_plan(items: Sequence[WorkItem]) -> bytes:
    """The plan as lines of JSON: a head, a line for every file where it is first read, and a line for every item."""
    text_columns, rules = {item.text_column for item in items}, {item.rules for item in items}
    if len(text_columns) > 1 or len(rules) > 1:
        raise ValueError(f"items of one plan have one text column, not {', '.join(sorted(text_columns))}")
    head = {"format": _FORMAT, "text_column": "".join(text_columns), "items": len(items)}
    changes = [each.changes() for each in rules if each != AS_THEY_ARE]
    lines = [_compact(head | ({"rules": changes[0]} if changes else {}))]
    numbers: dict[Any, int] = {}
    for item in items:
        values = [item.index]
        for file_slice in item.slices:
            file = tuple(getattr(file_slice, name) for name in _FILE_FIELDS)
            if (file, file_slice.file) not in numbers:
                numbers[file, file_slice.file] = len(numbers)
                remote_file = dataclasses.astuple(file_slice.file) if file_slice.file else None
                lines.append(_compact({"file": [*file, remote_file]}))
            values += [numbers[file, file_slice.file], *(getattr(file_slice, name) for name in _RANGE_FIELDS)]
        lines.append(_compact(values))
    return "".join(f"{line}\n" for line in lines).encode()


def without_queries(items: Sequence[WorkItem]) -> list[WorkItem]:
    """The same items for a file on disk: addresses of the web without their queries, which may hold a signature."""
    return [_with_urls(item, stored_url) for item in items]


def with_address(items: Sequence[WorkItem], source: str) -> list[WorkItem]:
    """The same items, read from the web at the address that is given now, whose signature may be a new one."""
    wanted = stored_url(source)
    return [_with_urls(item, lambda url: source if stored_url(url) == wanted else url) for item in items]


def _with_urls(item: WorkItem, change: Callable[[str], str]) -> WorkItem:
    slices = tuple(
        dataclasses.replace(part, file=dataclasses.replace(part.file, url=change(part.file.url)))
        if part.file is not None and part.file.url.startswith(("http://", "https://"))
        else part
        for part in item.slices
    )
    return item if slices == item.slices else dataclasses.replace(item, slices=slices)


def load_plan(content: bytes) -> list[WorkItem]:
    """Read a saved plan; raises UserError if it is incomplete or of another version."""
    remote_fields = [field.name for field in dataclasses.fields(RemoteFile)]
    files: list[dict[str, Any]] = []
    items: list[WorkItem] = []
    lines = content.splitlines()
    try:
        head = json.loads(lines[0])
        rules = DocumentRules(**head.get("rules", {}))
        for line in lines[1:]:
            values = json.loads(line)
            if isinstance(values, dict):
                *plain, remote_file = values["file"]
                file = RemoteFile(**dict(zip(remote_fields, remote_file, strict=True))) if remote_file else None
                files.append(dict(zip(_FILE_FIELDS, plain, strict=True)) | {"file": file})
            else:
                slices = tuple(
                    FileSlice(**files[values[at]], **dict(zip(_RANGE_FIELDS, values[at + 1 : at + 5], strict=True)))
                    for at in range(1, len(values), 5)
                )
                item = WorkItem(index=values[0], slices=slices, text_column=head["text_column"], rules=rules)
                items.append(item)
        if head["format"] != _FORMAT or head["items"] != len(items):
            raise ValueError(f"{head['format']}, {len(items)} of {head['items']} items")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError) as error:
        raise UserError("the plan is damaged or of another version; choose another --output") from error
    return items


def _compact(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


# ---- dividing --------------------------------------------------------------------------------------------------------


class _Groups:
    """Groups of slices that become the items: parts of a file as they are, small files as many as fit together."""

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes
        self._groups: list[tuple[FileSlice, ...]] = []
        self._files: list[FileSlice] = []  # of the group that is not full yet
        self._free_bytes = item_bytes

    def add(self, parts: Iterable[FileSlice]) -> None:
        self._close()
        self._groups.append(tuple(parts))

    def add_file(self, file: FileSlice) -> None:
        if file.size_bytes > self._free_bytes:
            self._close()
        self._files.append(file)
        self._free_bytes -= file.size_bytes

    def items(self, text_column: str, rules: DocumentRules) -> list[WorkItem]:
        self._close()
        if not any(file_slice.size_bytes for group in self._groups for file_slice in group):
            raise UserError("the source holds no text")
        return [
            WorkItem(index=index, slices=group, text_column=text_column, rules=rules)
            for index, group in enumerate(self._groups)
        ]

    def _close(self) -> None:
        if self._files:
            self._groups.append(tuple(self._files))
        self._files = []
        self._free_bytes = self._item_bytes


def _divide(sizes: list[int], item_bytes: int) -> list[int]:
    """Unit numbers at which parts begin, and the end: as few parts of ``item_bytes`` as possible, of about equal size.

    A unit above ``item_bytes`` is a part of its own.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    best = _fill(ends, item_bytes)
    low = sum(size for size in sizes if size <= item_bytes) // (len(best) - 1)
    high = item_bytes
    while high - low > high // _PRECISION:
        middle = (low + high) // 2
        edges = _fill(ends, middle)
        if len(edges) == len(best):
            best, high = edges, middle
        else:
            low = middle + 1
    return best


def _fill(ends: list[int], part_bytes: int) -> list[int]:
    """Edges of parts of at most ``part_bytes``, or of one unit, each as large as possible."""
    edges = [0]
    while edges[-1] < len(ends) - 1:
        begin = edges[-1]
        edges.append(max(begin + 1, bisect.bisect_right(ends, ends[begin] + part_bytes, lo=begin) - 1))
    return edges


def _runs(units: list[int]) -> list[tuple[int, int]]:
    """[begin, end) of every run of consecutive unit numbers."""
    breaks = [at for at in range(1, len(units)) if units[at] != units[at - 1] + 1]
    return [(units[begin], units[end - 1] + 1) for begin, end in itertools.pairwise([0, *breaks, len(units)])]


def _parts(layout: Layout, edges: Sequence[int]) -> Iterator[FileSlice]:
    """The slice between every two edges; the last one of a file that a limit cuts has its number of records."""
    whole = layout.whole
    for begin, end in itertools.pairwise(edges):
        max_documents = None
        if whole.max_documents is not None and end == len(layout.sizes) and layout.documents is not None:
            max_documents = int(layout.documents[begin:end].sum())
        yield dataclasses.replace(
            whole,
            start=int(layout.bounds[begin]),
            stop=int(layout.bounds[end]),
            size_bytes=int(layout.sizes[begin:end].sum()),
            max_documents=max_documents,
        )


# ---- limits ----------------------------------------------------------------------------------------------------------


def _limited(
    layouts: Iterable[Layout], limit_documents: int | None, limit_bytes: int | None, rules: DocumentRules
) -> Iterator[Layout]:
    """The layouts up to the limits, the last one cut; where a limit cuts records, ``whole.max_documents`` is set."""
    for layout in layouts:
        if limit_bytes is not None:
            units = int(np.searchsorted(np.cumsum(layout.sizes), limit_bytes)) + 1
            limit_bytes -= int(layout.sizes.sum())
            layout = _first_units(layout, units)  # noqa: PLW2901
        if limit_documents is not None:
            layout, records = _first_records(layout, limit_documents, rules)  # noqa: PLW2901
            limit_documents -= records
        yield layout
        if (limit_bytes is not None and limit_bytes <= 0) or limit_documents == 0:
            return


def _first_units(layout: Layout, units: int) -> Layout:
    return dataclasses.replace(
        layout,
        bounds=layout.bounds[: units + 1],
        sizes=layout.sizes[:units],
        documents=None if layout.documents is None else layout.documents[:units],
    )


def _first_records(layout: Layout, limit: int, rules: DocumentRules) -> tuple[Layout, int]:
    """The layout of the first ``limit`` records, and their number."""
    if layout.documents is None:
        return _first_lines(layout, limit, rules)
    ends = np.cumsum(layout.documents)
    records = int(ends[-1]) if len(ends) else 0
    if records <= limit:
        return layout, records
    units = int(np.searchsorted(ends, limit)) + 1
    layout = _first_units(layout, units)
    if ends[units - 1] > limit:
        documents = layout.documents.copy()  # type: ignore[union-attr]
        documents[-1] -= ends[units - 1] - limit
        whole = dataclasses.replace(layout.whole, max_documents=limit)
        layout = dataclasses.replace(layout, whole=whole, documents=documents)
    return layout, limit


def _first_lines(layout: Layout, limit: int, rules: DocumentRules) -> tuple[Layout, int]:
    """The same for lines, rows, and documents between separators.

    A plain file of lines or documents is cut behind the last one, others get ``max_documents``.
    """
    whole = layout.whole
    stop = end = int(layout.bounds[-1])
    if whole.kind in ("jsonl", "documents"):
        stop_at = stop if whole.is_range else None
        with reading(whole.where), open_slice(whole) as file:
            content = unpacked(file, whole.name)
            if whole.kind == "jsonl":
                records, end = json_lines.count_records(content, limit, stop_at)
            else:
                separator = documents.Separator(rules.document_separator or "")
                records, end = documents.count_documents(content, limit, stop_at, separator)
    else:
        records = tables.count_rows(whole, limit)
    if records < limit:
        return layout, records
    if not whole.is_range:
        whole = dataclasses.replace(whole, max_documents=limit)
        return dataclasses.replace(layout, whole=whole, documents=np.array([limit])), limit
    units = int(np.searchsorted(layout.bounds, min(end, stop)))
    bounds = np.append(layout.bounds[:units], min(end, stop))
    return Layout(whole=whole, bounds=bounds, sizes=np.diff(bounds)), limit


# ---- samples ---------------------------------------------------------------------------------------------------------


def _spread(layouts: list[Layout], total_bytes: int, sample_bytes: int) -> Iterator[tuple[Layout, list[int]]]:
    """Units of each layout, evenly spread: the share chosen so far never exceeds the sample's share of the whole.

    At least the smallest unit is chosen.
    """
    seen_bytes = chosen_bytes = 0
    for layout in layouts:
        units = []
        for unit, size_bytes in enumerate(layout.sizes.tolist()):
            seen_bytes += size_bytes
            if size_bytes and (chosen_bytes + size_bytes) * total_bytes <= seen_bytes * sample_bytes:
                units.append(unit)
                chosen_bytes += size_bytes
        if units:
            yield layout, units
    if not chosen_bytes:
        texts = [layout for layout in layouts if layout.sizes.any()]
        smallest = min(texts, key=lambda layout: int(layout.sizes[layout.sizes > 0].min()))
        yield smallest, [smallest.sizes.tolist().index(smallest.sizes[smallest.sizes > 0].min())]
