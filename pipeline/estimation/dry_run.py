"""What jobs/tokenize.py --dry_run says of the work: items, bytes, documents, tokens, minutes, dollars; by a sample."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator

from pipeline.config.data import TokenizeConfig
from pipeline.console import format_rate, plain
from pipeline.dataset.shards import token_dtype
from pipeline.errors import UserError
from pipeline.estimation.estimate import Estimate, PlannedSource, dollars, estimate, seconds_on
from pipeline.estimation.nodes import Nodes, find_nodes
from pipeline.estimation.parts import choose_parts, records_of
from pipeline.estimation.sampling import SAMPLE_BYTES, SourceSample, take_sample
from pipeline.paths import resolve_output, resolve_path
from pipeline.preprocessing import tokenization
from pipeline.preprocessing.planning import document_rules, filter_rules
from pipeline.preprocessing.progress import read_layouts
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import Layout, find, resolve_source
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import LocalFolder

Rows = list[tuple[str, str]]

_SHOWN_REASONS = 6
_HEADER_BYTES = 1024  # of a shard; a work item has two


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The plan of a source, and what is known of it before anything but footers is read."""

    items: list[WorkItem]
    layouts: dict[str, Layout]
    """Name of a parquet file -> its row groups."""
    source: PlannedSource
    num_files: int
    is_remote: bool


def describe_work(config: TokenizeConfig) -> Rows:
    """Names and sentences: what the source holds, and what it takes to tokenize it. Nothing is written.

    The files are listed, footers and a sample of some MB are read, of remote files by small ranges. Raises UserError
    for a mistake that would end the job.
    """
    tokenizer = str(resolve_path(config.tokenizer)) if config.tokenizer else None
    config = dataclasses.replace(config, source=resolve_source(config.source), tokenizer=tokenizer)
    rules = filter_rules(config)
    rules.require_usable()
    given = tokenization.given_tokenizer(config)
    sets = tokenization.evaluation_sets(config)
    plan = _make_plan(config)
    parts = choose_parts(plan.items, plan.layouts, SAMPLE_BYTES)
    sample = take_sample(parts, config, tokenizer=given, sets=sets)
    vocab_size = given.vocab_size if given else config.vocab_size
    expected = estimate(
        plan.source,
        sample,
        passes=1 if config.dedup == "off" else 2,
        bytes_per_token=token_dtype(vocab_size).itemsize,
    )
    rows = [("would fail", plain(problem)) for problem in sample.problems]
    if expected is None:
        return [*rows, _source_row(plan, None), ("time", "unknown: no document of the sample could be read")]
    return [
        *rows,
        _source_row(plan, expected),
        *_sample_rows(plan, sample, num_parts=len(parts)),
        *_expected_rows(config, plan, sample, expected),
        *_time_rows(config, plan, expected),
        *_download_rows(plan, sample),
        *_node_rows(config, plan, expected),
    ]


def _make_plan(config: TokenizeConfig) -> _Plan:
    """The plan, as the job makes it."""
    source = find(config.source)
    damage: Damage | None = [] if config.skip_bad_files else None
    layouts: dict[str, Layout] = {}

    def noted(found: Iterable[Layout]) -> Iterator[Layout]:
        for layout in found:
            if layout.whole.kind == "parquet":
                layouts[layout.whole.name] = layout
            sizes[layout.whole.name] = int(layout.sizes.sum())
            yield layout

    sizes: dict[str, int] = {}
    items = make_plan(
        noted(read_layouts(source, config, damage)),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        limit_documents=config.limit_documents,
        limit_bytes=config.limit_bytes,
        rules=document_rules(config),
    )
    stored = {entry.name: entry.size_bytes for entry in source.inputs}
    slices = [file_slice for item in items for file_slice in item.slices]
    records = [records_of(file_slice, layouts.get(file_slice.name)) for file_slice in slices]
    known = [count for count in records if count is not None]
    return _Plan(
        items=items,
        layouts=layouts,
        source=PlannedSource(
            item_bytes=[item.size_bytes for item in items],
            stored_bytes=round(
                sum(
                    (stored.get(each.name) or each.size_bytes) * each.size_bytes / max(1, sizes[each.name])
                    for each in slices
                )
            ),
            records=sum(known) if len(known) == len(records) else None,
        ),
        num_files=len({file_slice.name for file_slice in slices}),
        is_remote=any(file_slice.file is not None for file_slice in slices),
    )


# ---- sentences -------------------------------------------------------------------------------------------------------


def _source_row(plan: _Plan, expected: Estimate | None) -> tuple[str, str]:
    text = f", about {_megabytes(expected.text_bytes)} of text" if expected else ""
    return (
        "source",
        f"{_counted(plan.num_files, 'file')} of {_megabytes(plan.source.stored_bytes)} as they are stored{text}, in "
        f"{_counted(len(plan.items), 'work item')}",
    )


def _sample_rows(plan: _Plan, sample: SourceSample, *, num_parts: int) -> Rows:
    whole = sample.planned_bytes >= plan.source.planned_bytes
    places = "the whole source" if whole else f"{_counted(num_parts, 'part')} of the source"
    rows = [("sample", f"{sample.documents:,} documents, {_megabytes(sample.text_bytes)} of text, from {places}")]
    reasons = sample.unread + sample.dropped
    if reasons:
        shown = [f"{count:,} {reason}" for reason, count in reasons.most_common(_SHOWN_REASONS)]
        others = reasons.total() - sum(count for _, count in reasons.most_common(_SHOWN_REASONS))
        rows.append(("left out", f"{', '.join([*shown, *([f'{others:,} others'] if others else [])])}, of the sample"))
    if sample.damaged:
        number, first = len(sample.damaged), plain(sample.damaged[0]["reason"])
        rows.append(("damaged", f"{number:,} of the sample's inputs cannot be read whole; the first: {first}"))
    return rows


def _expected_rows(config: TokenizeConfig, plan: _Plan, sample: SourceSample, expected: Estimate) -> Rows:
    share = sample.kept_documents / sample.worked_documents
    text_share = sample.kept_bytes / sample.worked_bytes
    if sample.is_trained:
        encoded = "encoded with a tokenizer that was trained on the sample, so it may be more"
    else:
        encoded = "with the given tokenizer"
    rows = [
        (
            "documents",
            f"about {expected.documents:,.0f}, of which {share:.1%} stay, with {text_share:.1%} of the text: "
            f"{expected.kept_documents:,.0f}",
        ),
        ("tokens", f"about {expected.tokens:,.0f}, {encoded}"),
        ("shards", _shards(config, plan, expected)),
    ]
    if config.dedup != "off":
        rows.append(("copies", "they are not taken off: which documents are copies no sample tells"))
    return rows


def _shards(config: TokenizeConfig, plan: _Plan, expected: Estimate) -> str:
    num_bytes = expected.shard_bytes + 2 * _HEADER_BYTES * len(plan.items)
    output = resolve_output(config.output)
    needed = f"about {_megabytes(num_bytes)} in {output}"
    if not isinstance(output, LocalFolder):
        return needed
    there = next(folder for folder in [output.path, *output.path.parents] if folder.exists())
    free = shutil.disk_usage(there).free
    return f"{needed}, where {_megabytes(free)} are free{': too little' if free < num_bytes else ''}"


def _time_rows(config: TokenizeConfig, plan: _Plan, expected: Estimate) -> Rows:
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in expected.shares.items())
    twice = "" if config.dedup == "off" else "; the source is read twice"
    here = config.num_workers or os.cpu_count() or 1
    return [
        ("speed", f"{format_rate(1 / expected.seconds_per_byte)} of text on one core here ({shares}{twice})"),
        ("time here", f"{_time(here, plan, expected)} on {_counted(here, 'CPU')}, {_without(config)}"),
    ]


def _without(config: TokenizeConfig) -> str:
    return "without writing, the start of Ray" + ("" if config.tokenizer else ", the training of the tokenizer")


def _time(workers: int, plan: _Plan, expected: Estimate) -> str:
    return f"about {_duration(seconds_on(workers, plan.source, expected))}"


def _download_rows(plan: _Plan, sample: SourceSample) -> Rows:
    if not plan.is_remote or not sample.download_seconds:
        return []
    rate = sample.download_bytes / sample.download_seconds
    seconds = plan.source.stored_bytes / rate
    return [
        (
            "download",
            f"{format_rate(rate)} here with one request of 1 MB at a time: {_duration(seconds)} for all files; the job "
            "has several requests under way at a time, and is no faster than the line",
        )
    ]


def _node_rows(config: TokenizeConfig, plan: _Plan, expected: Estimate) -> Rows:
    """Minutes and dollars on the nodes of a cluster."""
    try:
        nodes = find_nodes(config.nodes)
    except UserError as error:
        return [("cost", f"unknown: {plain(str(error))}")]
    if nodes is None:
        return [("cost", "unknown: no nodes are given; --nodes takes NUMBERxCPUS, such as 8x16, or a Ray cluster file")]
    which = f"{_counted(nodes.count, 'node')} with {_counted(nodes.cpus, 'CPU')} in all ({nodes.source})"
    time = f"{_time(nodes.cpus, plan, expected)} on {which}, if a core there is as fast as one here"
    return [("on nodes", time), ("cost", _cost(config.price_per_hour, nodes, plan, expected))]


def _cost(price: float | None, nodes: Nodes, plan: _Plan, expected: Estimate) -> str:
    if price is None:
        return "unknown: no price is given; --price_per_hour takes the dollars of one node per hour"
    work = dollars(nodes.count, seconds_on(nodes.cpus, plan.source, expected), price)
    idle = dollars(nodes.count, nodes.idle_seconds, price)
    later = f", ${idle:,.2f} for the {nodes.idle_seconds / 60:g} idle minutes behind it" if idle else ""
    return f"${work:,.2f} for the work{later}, at ${price:g} a node and hour, without the nodes' start and the head"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 7200 else f"{seconds / 60:,.2f} minutes"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:,.1f} MB"
