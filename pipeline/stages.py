"""Raw text to shards on Ray Data: download, encode, write, one task per work item.

The three stages have equal resources, so Ray fuses them into one task and no text travels through the object store:
what comes back is one row of figures per item. Execution is at least once (a killed task starts again), results are
exactly once, because a shard's bytes are a function of its item, the tokenizer and the settings, and appear whole.
Ray must be initialised by the caller; ``finished`` answers without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import bpe, bpe_training, ledger
from pipeline.bpe_files import Pattern
from pipeline.config import TokenizeConfig, TrainTokenizerConfig
from pipeline.documents import encode_documents, split_by_hash
from pipeline.errors import UserError
from pipeline.ledger import ItemRecord, RunRecord
from pipeline.readers import read_item
from pipeline.shards import SPLITS, Manifest, ShardEntry, write_shard
from pipeline.sources import Source, WorkItem, pack, plan, spread
from pipeline.stage_progress import ItemProgress, MergeProgress

_MAX_ARRAYS = 100  # of an item's texts are columns of a table; more, where row groups are small, are joined
MERGED_AT_ONCE = 16  # counts of so many items, some MB each, wait in the driver

logger = logging.getLogger(__name__)

StageFunction: TypeAlias = Callable[..., Any]
Stages: TypeAlias = list[tuple[StageFunction, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a tokenization did."""

    manifest: Manifest
    num_items: int
    """Work items of the source."""
    num_items_done: int
    """Of them, in this run; the rest had been done before."""
    text_bytes: int
    """Of the documents encoded in this run."""
    tokens: int
    """Written in this run."""
    seconds: float
    """Of this run, training a tokenizer included."""
    encode_seconds: float
    """Of them, reading, encoding and writing, with the seconds that Ray takes to start the first tasks."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training of a tokenizer did."""

    tokenizer: bpe.Tokenizer
    documents: int
    """Counted; those held out for validation are not."""
    text_bytes: int
    distinct_pretokens: int
    skipped: dict[str, int]
    """Reason -> documents left out."""
    count_seconds: float
    """Reading and counting, with the seconds that Ray takes to start the first tasks."""
    merge_seconds: float


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What every task of a run is told."""

    output: str
    tokenizer_fingerprint: str
    settings: str
    """JSON of what the shards depend on besides input and tokenizer."""
    val_fraction: float

    def key(self, item: WorkItem) -> str:
        """What an item's shards are a function of."""
        return hashlib.sha256(f"{item.key} {self.settings} {self.tokenizer_fingerprint}".encode()).hexdigest()


def finished(config: TokenizeConfig, output: Path) -> Manifest | None:
    """The manifest, if ``output`` holds all shards of this config already; needs no Ray.

    Raises UserError where the folder was begun with other settings or other input.
    """
    if ledger.read_run(output) is None:
        return None
    return ledger.finished(config, output, ledger.settings_of(config, _given_fingerprint(config)))


def tokenize(config: TokenizeConfig, output: Path) -> Summary:
    """Write the shards of ``config.source`` to ``output`` (absolute), or what is left of them, and the manifest.

    Raises UserError for what the user can mend, whichever worker met it; the same call then goes on.
    """
    start = time.perf_counter()
    _quiet_ray_data()
    settings = ledger.settings_of(config, _given_fingerprint(config))
    source = ledger.find_source(config.source, output)
    run = RunRecord(source=config.source, pinned=source.pinned, settings=settings, inputs=tuple(source.inputs()))
    ledger.claim(output, run)
    items = plan(source, text_column=config.text_column, item_bytes=config.item_bytes)
    tokenizer = _prepare_tokenizer(config, source, output)
    job = EncodeJob(
        output=str(output),
        tokenizer_fingerprint=tokenizer.fingerprint,
        settings=json.dumps(settings, sort_keys=True),
        val_fraction=config.val_fraction,
    )
    left = [item for item in items if ledger.read_item_record(output, item.index, job.key(item)) is None]
    encode_start = time.perf_counter()
    text_bytes, tokens = _encode_items(left, job, tokenizer.vocab_size, config.num_workers)
    encode_seconds = time.perf_counter() - encode_start
    manifest = _finish(run, tokenizer, [job.key(item) for item in items], output)
    return Summary(
        manifest=manifest,
        num_items=len(items),
        num_items_done=len(left),
        text_bytes=text_bytes,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        encode_seconds=encode_seconds,
    )


def train_tokenizer(config: TrainTokenizerConfig, source: Source, output: Path) -> Training:
    """Learn a tokenizer from a sample of ``source``: equal for any number of workers and any size of work items.

    ``output`` (absolute) has been claimed by the caller (``ledger.claim``), who also saves the tokenizer.
    """
    bpe_training.warm_up()  # compiled here once, not in every worker at the same time
    start = time.perf_counter()
    _quiet_ray_data()
    counts, figures, skipped = _count_items(config, source, output)
    merge_start = time.perf_counter()
    logger.info("learning a tokenizer of %d ids from %d distinct pre-tokens", config.vocab_size, counts.table.num_rows)
    progress = MergeProgress()
    try:
        tokenizer = bpe_training.train_bpe(
            counts, config.vocab_size, config.special_tokens, progress, min_frequency=config.min_frequency
        )
    finally:
        progress.close()
    return Training(
        tokenizer=tokenizer,
        documents=figures["documents"],
        text_bytes=figures["text_bytes"],
        distinct_pretokens=counts.table.num_rows,
        skipped=dict(sorted(skipped.items())),
        count_seconds=merge_start - start,
        merge_seconds=time.perf_counter() - merge_start,
    )


# ---- stages: one row, that of a work item, in; one row out -----------------------------------------------------------


def _stage(function: StageFunction) -> StageFunction:
    """Carry a UserError to the driver as a row: Ray would keep its text only, inside that of another exception."""

    @functools.wraps(function)
    def stage(row: pa.Table, **arguments: Any) -> Any:
        if "error" in row.column_names:
            return row
        try:
            return function(row, **arguments)
        except UserError as error:
            return pa.table({"error": [str(error)]})

    return stage


@_stage
def download(row: pa.Table, output: str, verb: str) -> pa.Table:
    """A work item -> its texts."""
    item = WorkItem.from_json(row["item"][0].as_py())
    ledger.begin_attempt(Path(output), f"{verb}-{item.index:06d}")
    skipped: Counter[str] = Counter()
    texts = [array.cast(pa.large_string()) for array in read_item(item, skipped)]
    if len(texts) > _MAX_ARRAYS:
        texts = [pa.concat_arrays(texts)]
    return pa.table({"item": row["item"], "skipped": [json.dumps(skipped)], **_in_one_row("texts", texts)})


@_stage
def encode(row: pa.Table, job: EncodeJob) -> pa.Table:
    """Texts -> token ids of train and val, with their figures."""
    tokenizer = _load_tokenizer(str(Path(job.output) / ledger.TOKENIZER_NAME), job.tokenizer_fingerprint)
    columns: dict[str, Any] = {"item": row["item"], "skipped": row["skipped"]}
    for split, texts in zip(SPLITS, split_by_hash(_texts(row), job.val_fraction), strict=True):
        columns[f"{split}_documents"] = [len(texts)]
        columns[f"{split}_text_bytes"] = [_text_bytes(texts)]
        columns |= _in_one_row(f"{split}_ids", [pa.array(encode_documents(tokenizer, texts))])
    return pa.table(columns)


@_stage
def write(row: pa.Table, job: EncodeJob, vocab_size: int) -> pa.Table:
    """Token ids -> shards and their record; figures of the item."""
    item = WorkItem.from_json(row["item"][0].as_py())
    output = Path(job.output)
    entries = []
    for split in SPLITS:
        (array,) = _from_one_row(row, f"{split}_ids")
        ids = array.to_numpy(zero_copy_only=True)
        if len(ids) == 0:
            continue
        name = f"{split}_{item.index:06d}.bin"
        sha256 = write_shard(output / name, ids, vocab_size=vocab_size)
        entries.append(
            ShardEntry(
                name=name,
                split=split,
                tokens=len(ids),
                documents=row[f"{split}_documents"][0].as_py(),
                text_bytes=row[f"{split}_text_bytes"][0].as_py(),
                sha256=sha256,
                source=item.label,
            )
        )
    skipped = json.loads(row["skipped"][0].as_py())
    ledger.write_item(output, item.index, ItemRecord(key=job.key(item), shards=tuple(entries), skipped=skipped))
    ledger.end_attempt(output, f"encode-{item.index:06d}")
    return pa.table(
        {
            "size_bytes": [item.size_bytes],
            "text_bytes": [sum(entry.text_bytes for entry in entries)],
            "tokens": [sum(entry.tokens for entry in entries)],
        }
    )


@_stage
def count(row: pa.Table, output: str, val_fraction: float, pattern: Pattern) -> pa.Table:
    """Texts -> how often each pre-token occurs in the train documents."""
    item = WorkItem.from_json(row["item"][0].as_py())
    train, _ = split_by_hash(_texts(row), val_fraction)
    counts = bpe_training.count_pretokens(train, pattern=pattern).table
    ledger.end_attempt(Path(output), f"count-{item.index:06d}")
    return pa.table(
        {
            "size_bytes": [item.size_bytes],
            "text_bytes": [_text_bytes(train)],
            "tokens": [0],
            "documents": [len(train)],
            "skipped": row["skipped"],
            **_in_one_row("counts", [counts.to_struct_array().combine_chunks()]),
        }
    )


def _in_one_row(name: str, arrays: Sequence[Any]) -> dict[str, Any]:
    """Columns of one list each, an array: Ray may cut a table between rows, but not within one. Nothing is copied."""
    return {
        f"{name}_{number}": pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)
        for number, array in enumerate(arrays)
    }


def _from_one_row(row: pa.Table, name: str) -> list[Any]:
    """The arrays that ``_in_one_row`` was given; combine_chunks would copy them."""
    return [row[column][0].values for column in row.column_names if column.startswith(f"{name}_")]


def _texts(row: pa.Table) -> pa.ChunkedArray:
    return pa.chunked_array(_from_one_row(row, "texts"), pa.large_string())


def _text_bytes(texts: Any) -> int:
    return int(pc.sum(pc.binary_length(texts)).as_py() or 0)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str, fingerprint: str) -> bpe.Tokenizer:
    """Once per worker process."""
    tokenizer = bpe.Tokenizer.from_file(path)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{path} changed while the job ran; run the same command again")
    return tokenizer


# ---- driver ----------------------------------------------------------------------------------------------------------


def _encode_items(items: list[WorkItem], job: EncodeJob, vocab_size: int, num_workers: int | None) -> tuple[int, int]:
    """Encode and write ``items``; returns bytes of text and tokens."""
    if not items:
        return 0, 0
    stages: Stages = [
        (download, {"output": job.output, "verb": "encode"}),
        (encode, {"job": job}),
        (write, {"job": job, "vocab_size": vocab_size}),
    ]
    text_bytes = tokens = 0
    for row in _run_stages(items, stages, num_workers, title="tokenize"):
        text_bytes += row["text_bytes"][0].as_py()
        tokens += row["tokens"][0].as_py()
    return text_bytes, tokens


def _prepare_tokenizer(config: TokenizeConfig, source: Source, output: Path) -> bpe.Tokenizer:
    """The tokenizer of the run, in ``output/tokenizer.json``: given, made by an earlier run, or trained now."""
    path = output / ledger.TOKENIZER_NAME
    if config.tokenizer:
        tokenizer = bpe.Tokenizer.from_file(config.tokenizer)
        tokenizer.save(path)
    elif path.exists():
        tokenizer = bpe.Tokenizer.from_file(path)
        logger.info("tokenizer %s is there from an earlier run", path)
    else:
        training = TrainTokenizerConfig(
            source=config.source,
            text_column=config.text_column,
            vocab_size=config.vocab_size,
            sample_bytes=config.sample_bytes,
            val_fraction=config.val_fraction,
            item_bytes=config.item_bytes,
            num_workers=config.num_workers,
        )
        tokenizer = train_tokenizer(training, source, output).tokenizer
        tokenizer.save(path)
    bpe.warm_up()
    return tokenizer


def _count_items(
    config: TrainTokenizerConfig, source: Source, output: Path
) -> tuple[bpe_training.PretokenCounts, Counter[str], Counter[str]]:
    """How often each pre-token occurs in the sample; documents and bytes of text; documents skipped, by reason."""
    pieces = spread(source.pieces(config.text_column), config.sample_bytes)
    items = pack(pieces, text_column=config.text_column, item_bytes=config.item_bytes)
    stages: Stages = [
        (download, {"output": str(output), "verb": "count"}),
        (count, {"output": str(output), "val_fraction": config.val_fraction, "pattern": config.pattern}),
    ]
    figures: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    parts: list[bpe_training.PretokenCounts] = []
    for row in _run_stages(items, stages, config.num_workers, title="count"):
        figures.update({name: row[name][0].as_py() for name in ("documents", "text_bytes")})
        skipped.update(json.loads(row["skipped"][0].as_py()))
        (array,) = _from_one_row(row, "counts")
        table = pa.Table.from_struct_array(array).cast(bpe_training.COUNTS_SCHEMA)
        parts.append(bpe_training.PretokenCounts(table=table, pattern=config.pattern))
        if len(parts) == MERGED_AT_ONCE:
            parts = [bpe_training.merge_counts(parts)]
    return bpe_training.merge_counts(parts), figures, skipped


def _given_fingerprint(config: TokenizeConfig) -> str | None:
    return bpe.Tokenizer.from_file(config.tokenizer).fingerprint if config.tokenizer else None


def _run_stages(items: list[WorkItem], stages: Stages, num_workers: int | None, *, title: str) -> Iterator[Any]:
    """The last stage's row (a table of one) for every item, as they get done; raises the first UserError of a stage."""
    import ray

    strategy = ray.data.TaskPoolStrategy(size=num_workers and min(num_workers, len(items)))
    dataset: ray.data.Dataset = ray.data.from_items(
        [{"item": item.to_json()} for item in items], override_num_blocks=len(items)
    )
    for function, arguments in stages:
        dataset = dataset.map_batches(
            function,
            batch_size=None,
            batch_format="pyarrow",
            compute=strategy,
            fn_kwargs=arguments,
        )
    progress = ItemProgress(title, sum(item.size_bytes for item in items), len(items))
    try:
        row: Any
        for row in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            if "error" in row.column_names:
                raise UserError(row["error"][0].as_py())
            progress.add(*(row[name][0].as_py() for name in ("size_bytes", "text_bytes", "tokens")))
            yield row
    finally:
        progress.close()


def _finish(run: RunRecord, tokenizer: bpe.Tokenizer, keys: list[str], output: Path) -> Manifest:
    """Gather the records of all items into the manifest, and write it."""
    records = [ledger.read_item_record(output, index, key) for index, key in enumerate(keys)]
    done = [record for record in records if record is not None]
    if len(done) < len(records):
        raise UserError(f"shards vanished from {output} while the job ran; run the same command again")
    skipped = ledger.total_skipped(done)
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        settings=run.settings,
        inputs=tuple(entry.describe() for entry in run.inputs),
        shards=tuple(entry for record in done for entry in record.shards),
        skipped=skipped,
    )
    if not manifest.shards:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in skipped.items()) or "none at all"
        raise UserError(f"source {run.source} holds no document that could be used ({reasons})")
    ledger.remove_others(output, {entry.name for entry in manifest.shards})
    ledger.remove_leftovers(output)
    manifest.save(output)
    return manifest


def _quiet_ray_data() -> None:
    """Our own bar and log lines speak; Ray Data's full log lies in its session folder."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
