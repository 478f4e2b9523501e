"""The tasks of the Ray Data graph (ray_dataflow.py connects them): download, encode, write; count; find duplicates.

Execution is at least once (a killed task starts again), results are exactly once: what a task writes is a function of
its item, the tokenizer and the settings, appears whole, and is not made again where its record is there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import pyarrow as pa

from pipeline.dataset.manifest import SPLITS, ShardEntry
from pipeline.dataset.shards import shard_parts, token_dtype
from pipeline.decontamination import documents as decontamination
from pipeline.decontamination.documents import Origins, without_questions
from pipeline.decontamination.evaluation_sets import EvaluationSets
from pipeline.deduplication import exact
from pipeline.errors import DamagedInputError, UserError
from pipeline.filters.rules import Rules, filtered
from pipeline.preprocessing import resume_state
from pipeline.preprocessing.encode_documents import EncodedPart, encode_parts, in_groups, split_texts, text_bytes
from pipeline.preprocessing.resume_state import ItemRecord
from pipeline.preprocessing.rows import ItemRow, error_values, stage_of
from pipeline.remote import files as remote_files
from pipeline.remote.download_cache import Cache
from pipeline.sources.column_chunks import fetch_column_chunks, needed_bytes
from pipeline.sources.plan import load_plan
from pipeline.sources.readers import read_item
from pipeline.sources.work_items import Damage, FileSlice, WorkItem
from pipeline.storage.folders import Folder, node_cache, open_folder
from pipeline.tokenizer import bpe
from pipeline.tokenizer import training as bpe_training
from pipeline.tokenizer.files import collector_paused
from pipeline.tokenizer.patterns import Pattern

if TYPE_CHECKING:
    from ray import ObjectRef

Skip: TypeAlias = Collection[Literal["files", "records"]]
"""What is left out where it cannot be read, instead of ending the run."""

_WHOLE_FILE_SHARE = 0.5  # of a file; for a smaller share ranges are fetched, which no checksum covers
_COUNTED_BYTES = 64_000_000  # of text in memory while pre-tokens are counted


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """The settings of every encoding task of a run."""

    output: str
    """Path or bucket address of the output folder."""
    tokenizer: bpe.Tokenizer | ObjectRef[bpe.Tokenizer]
    """The tokenizer, or its place in Ray's object store, from where it is read in a quarter of the time of its file."""
    tokenizer_fingerprint: str
    vocab_size: int
    settings: str
    """JSON of the settings that the shards depend on."""
    val_fraction: float
    val_split: str = "documents"
    """What is held out: documents, or the tail of each."""
    part_bytes: int
    """Bytes of text after which a very large item continues in another shard."""
    skip: Skip
    num_items: int
    """Number of work items of the whole plan."""
    partitions: int = 0
    """Number of files that name the documents which are copies; 0 without deduplication."""
    rules: Rules = dataclasses.field(default_factory=Rules)
    """What documents must keep to."""
    copies: str = "duplicate"
    """Reason under which the documents that are copies are counted."""
    evaluation_sets: EvaluationSets | ObjectRef[EvaluationSets] | None = None
    """The questions that no document may hold, or their place in Ray's object store."""

    def key(self, item: WorkItem) -> str:
        """Hash of everything that an item's shards depend on."""
        return hashlib.sha256(f"{item.key} {self.settings} {self.tokenizer_fingerprint}".encode()).hexdigest()


# ---- stages ----------------------------------------------------------------------------------------------------------


@stage_of(lambda arguments: {"slice": pa.int32(), "start": pa.int64(), "data": pa.large_binary()})
def download(row: ItemRow, cache_bytes: int) -> Iterator[ItemRow]:
    """Work items that are fetched together -> each with the bytes that it needs of remote files."""
    items = load_plan(row.item.encode())
    num_fetched = 0
    try:
        for fetched in _fetch(items, Cache(node_cache("downloads"), cache_bytes)):
            yield fetched
            num_fetched += 1
    except UserError as error:  # of a file that the other items read, too
        yield from (ItemRow.of(item, **error_values(error)) for item in items[num_fetched:])


def _fetch(items: list[WorkItem], cache: Cache) -> Iterator[ItemRow]:
    file = items[0].slices[0].file
    if file is None or any(file_slice.file != file for item in items for file_slice in item.slices):
        yield from (_fetched(item, functools.partial(_open_cached, cache)) for item in items)
    elif needed_bytes(items, _open_remote) < _WHOLE_FILE_SHARE * file.size_bytes:
        yield from (_fetched(item, _open_remote) for item in items)
    else:
        with cache.file(file) as path:
            yield from (_fetched(item, lambda _: path.open("rb")) for item in items)


def _fetched(item: WorkItem, open_file: Callable[[FileSlice], BinaryIO]) -> ItemRow:
    fetched = fetch_column_chunks(item, open_file)
    arrays = {name: fetched[name].combine_chunks() for name in fetched.column_names}
    return ItemRow.of(item, arrays=arrays)


def _open_remote(file_slice: FileSlice) -> BinaryIO:
    assert file_slice.file is not None
    return remote_files.open_file(file_slice.file)


def _open_cached(cache: Cache, file_slice: FileSlice) -> BinaryIO:
    assert file_slice.file is not None
    with cache.file(file_slice.file) as path:
        return path.open("rb")  # stays readable when the cache deletes the file


@stage_of(
    lambda arguments: {
        f"{split}_ids": pa.from_numpy_dtype(token_dtype(arguments["job"].vocab_size)) for split in SPLITS
    }
)
def encode(row: ItemRow, job: EncodeJob) -> Iterator[ItemRow]:
    """Texts -> token ids of train and val, a row per part; only figures for an item that was done before."""
    item, folder = row.work_item, open_folder(job.output)
    records = resume_state.read_item_records(folder, item.index, job.key(item), job.vocab_size)
    if records is not None:
        yield ItemRow(item=row.item, figures=sum_up(records))
        return
    skipped: Counter[str] = Counter()
    damaged: list[dict[str, str]] = []
    first: dict[str, str] = {}
    number = 0
    try:
        row.raise_error()
        begin_attempt(folder, "encode", item)
        leave_out = (damaged if "files" in job.skip else None, first if "records" in job.skip else None)
        arrays = _chosen(row, folder, job, skipped, leave_out)
        tokenizer = get_tokenizer(job.tokenizer)
        shares: dict[str, Any] = {"val_fraction": job.val_fraction, "val_split": job.val_split}
        for part in encode_parts(arrays, tokenizer, part_bytes=job.part_bytes, **shares):
            yield _part_row(row, number, part, {"skipped": skipped, "damaged": damaged, "first_skipped": first})
            number += 1
    except DamagedInputError as error:
        if "files" not in job.skip:
            raise
        nothing = dict.fromkeys(SPLITS, 0)
        figures = {"part": number, "is_last": True, "documents": nothing, "text_bytes": nothing, "lengths": []}
        reasons = [*damaged, {"name": item.label, "reason": str(error)}]
        left_out = {"skipped": skipped, "damaged": reasons, "first_skipped": first}
        yield ItemRow(item=row.item, figures=figures | left_out)


def _chosen(
    row: ItemRow,
    folder: Folder,
    job: EncodeJob,
    skipped: Counter[str],
    leave_out: tuple[Damage | None, dict[str, str] | None],
) -> Iterator[pa.Array]:
    """The documents of an item that are encoded; the others are counted, and those with a question listed."""
    item = row.work_item
    origins = Origins() if job.evaluation_sets is not None else None
    read = read_item if origins is None else origins.read
    keep = None if origins is None else origins.keep
    arrays = read(item, skipped, fetched_table(row), *leave_out)
    if job.rules:
        arrays = filtered(arrays, job.rules, skipped, keep)
    if job.partitions:
        rows = _duplicates(folder, job, item.index)
        skipped[job.copies] += len(rows)
        arrays = exact.without_rows(arrays, rows, keep)
    if origins is None or job.evaluation_sets is None:
        yield from arrays
        return
    lines: list[bytes] = []
    yield from without_questions(arrays, get_evaluation_sets(job.evaluation_sets), origins, lines)
    if lines:
        skipped[decontamination.REASON] += len(lines)
        folder.write(decontamination.list_name(item.index), lines)


def _part_row(row: ItemRow, number: int, part: EncodedPart, left_out: dict[str, Any]) -> ItemRow:
    figures = {
        "part": number,
        "is_last": part.is_last,
        "documents": part.documents,
        "text_bytes": part.text_bytes,
        "lengths": part.lengths,
    }
    # What was left out is known only when the last document has been read.
    nothing: dict[str, Any] = {"skipped": {}, "damaged": [], "first_skipped": {}}
    figures |= left_out | {"skipped": +left_out["skipped"]} if part.is_last else nothing
    arrays = {f"{split}_ids": pa.array(part.ids[split]) for split in SPLITS}
    return ItemRow(item=row.item, figures=figures, arrays=arrays)


@stage_of(lambda arguments: {})
def write(row: ItemRow, job: EncodeJob) -> Iterator[ItemRow]:
    """Token ids -> shards and their record, and the figures of the part; a shard for each split in the figures."""
    row.raise_error()
    if "part" not in row.figures:  # was done before
        yield ItemRow(item=row.item, figures=row.figures)
        return
    item, folder, figures = row.work_item, open_folder(job.output), row.figures
    entries = []
    for split in figures["documents"]:
        ids = row.arrays[f"{split}_ids"].to_numpy(zero_copy_only=True)
        if len(ids) == 0:
            continue
        name = resume_state.shard_name(split, item.index, figures["part"])
        entry = ShardEntry(
            name=name,
            split=split,
            tokens=len(ids),
            documents=figures["documents"][split],
            text_bytes=figures["text_bytes"][split],
            learned_tokens=figures.get("learned_tokens", {}).get(split, 0),
            sha256=folder.write(name, shard_parts(ids, vocab_size=job.vocab_size), flush="content"),
            source=item.label,
        )
        entries.append(entry)
    record = ItemRecord(
        key=job.key(item),
        is_last=figures["is_last"],
        shards=tuple(entries),
        skipped=figures["skipped"],
        damaged=tuple(figures["damaged"]),
        first_skipped=figures["first_skipped"],
        lengths=tuple(figures["lengths"]),
    )
    resume_state.write_item(folder, item.index, figures["part"], record)
    if record.is_last:
        resume_state.end_attempt(folder, f"encode-{item.index:06d}")
    yield ItemRow(item=row.item, figures=sum_up([record]))


def sum_up(records: Sequence[ItemRecord]) -> dict[str, Any]:
    """The figures of the row of an item, or of a part of it, that is done."""
    shards = [entry for record in records for entry in record.shards if entry.split in SPLITS]
    return {
        "text_bytes": sum(entry.text_bytes for entry in shards),
        "tokens": sum(entry.tokens for entry in shards),
        "is_last": records[-1].is_last,
    }


@stage_of(lambda arguments: {"counts": pa.struct(bpe_training.COUNTS_SCHEMA)})
def count(row: ItemRow, output: str, val: tuple[float, str], pattern: Pattern, skip: Skip) -> Iterator[ItemRow]:
    """Texts -> counts of the pre-tokens in the train documents; ``val``: val_fraction and val_split."""
    item, folder = row.work_item, open_folder(output)
    skipped: Counter[str] = Counter()
    figures = Counter(documents=0, text_bytes=0)
    counts: list[bpe_training.PretokenCounts] = []
    for arrays in in_groups(texts_of(row, folder, "count", skipped, skip), _COUNTED_BYTES):
        train, _ = split_texts(pa.chunked_array(arrays, pa.large_string()), *val)
        counts = [bpe_training.merge_counts([*counts, bpe_training.count_pretokens(train, pattern=pattern)])]
        figures.update(documents=len(train), text_bytes=text_bytes(train))
    resume_state.end_attempt(folder, f"count-{item.index:06d}")
    table = counts[0].table if counts else bpe_training.COUNTS_SCHEMA.empty_table()
    yield ItemRow(
        item=row.item,
        figures={**figures, "skipped": skipped, "tokens": 0, "is_last": True},
        arrays={"counts": table.to_struct_array().combine_chunks()},
    )


def texts_of(row: ItemRow, folder: Folder, verb: str, skipped: Counter[str], skip: Skip) -> Iterator[pa.Array]:
    """The texts of an item as far as they can be read, where that is wanted."""
    try:
        row.raise_error()
        begin_attempt(folder, verb, row.work_item)
        damaged: Damage | None = [] if "files" in skip else None
        first: dict[str, str] | None = {} if "records" in skip else None
        yield from read_item(row.work_item, skipped, fetched_table(row), damaged, first)
    except DamagedInputError:
        if "files" not in skip:
            raise


def documents_of(row: ItemRow, folder: Folder, verb: str, skip: Skip, rules: Rules) -> Iterator[pa.Array]:
    """The texts of an item that keep to the rules, numbered as the encoding numbers them; nothing is counted."""
    arrays = texts_of(row, folder, verb, Counter(), skip)
    return filtered(arrays, rules, Counter()) if rules else arrays


@stage_of(lambda arguments: {})
def hash_documents(row: ItemRow, output: str, skip: Skip, rules: Rules) -> Iterator[ItemRow]:
    """Texts -> a file of the hashes of those that keep to the rules."""
    item, folder = row.work_item, open_folder(output)
    name = exact.hashes_name(item.index)
    num_bytes, hashes = 0, bytearray()
    if folder.size(name) is None:
        for array in documents_of(row, folder, "hash", skip, rules):
            num_bytes += text_bytes(array)
            hashes += exact.hash_documents(array)
        folder.write(name, [exact.hashes_to_bytes(bytes(hashes))])
        resume_state.end_attempt(folder, f"hash-{item.index:06d}")
    yield ItemRow(item=row.item, figures={"text_bytes": num_bytes, "tokens": 0, "is_last": True})


@stage_of(lambda arguments: {})
def search_duplicates(row: ItemRow, output: str, num_items: int, partitions: int) -> Iterator[ItemRow]:
    """A partition of the hashes -> a file that names the documents in it which are copies."""
    folder, partition = open_folder(output), int(row.item)
    files = [functools.partial(folder.read_range, exact.hashes_name(index)) for index in range(num_items)]
    found = exact.find_duplicates(files, partition, partitions)
    folder.write(exact.duplicates_name(partition), [found])
    yield ItemRow(item=row.item)


# ---- what the stages share -------------------------------------------------------------------------------------------


def fetched_table(row: ItemRow) -> pa.Table | None:
    """The table of the download stage; None for local items."""
    return pa.table(row.arrays) if "slice" in row.arrays else None


def begin_attempt(folder: Folder, verb: str, item: WorkItem) -> None:
    """Note that a task starts which reads ``item``; DamagedInputError if it was killed too often before."""
    import ray

    if not ray.is_initialized():  # called by a benchmark
        return
    context = ray.get_runtime_context()
    resume_state.begin_attempt(
        folder,
        f"{verb}-{item.index:06d}",
        label=item.label,
        job=context.get_job_id(),
        node=context.get_node_id(),
        alive_nodes=lambda: {node["NodeID"] for node in ray.nodes() if node["Alive"]},
    )


def _duplicates(folder: Folder, job: EncodeJob, index: int) -> exact.Rows:
    names = [exact.duplicates_name(partition) for partition in range(job.partitions)]
    return exact.rows_of_item([functools.partial(folder.read_range, name) for name in names], index, job.num_items)


def use_system_memory() -> None:
    """Let Arrow allocate memory as the rest of the process does, and not in its own pool.

    That pool (mimalloc) returns memory to the system and requests it again with every array: with two processes at a
    time the kernel took 0.7 of the 3.3 s for 249 MB, and 0.3 of 2.9 s with the system's allocator.
    """
    pa.set_memory_pool(pa.system_memory_pool())


@functools.lru_cache(maxsize=1)
def get_tokenizer(tokenizer: bpe.Tokenizer | ObjectRef[bpe.Tokenizer]) -> bpe.Tokenizer:
    """One tokenizer for all items that a worker process encodes, since it caches pre-tokens."""
    if isinstance(tokenizer, bpe.Tokenizer):
        return tokenizer
    import ray

    with collector_paused():
        return ray.get(tokenizer)


@functools.lru_cache(maxsize=1)
def get_evaluation_sets(sets: EvaluationSets | ObjectRef[EvaluationSets]) -> EvaluationSets:
    """The questions, read once for all items of a worker process."""
    if isinstance(sets, EvaluationSets):
        return sets
    import ray

    return ray.get(sets).writable()
