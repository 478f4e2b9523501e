"""From a source of raw text to shards and their manifest, on a Ray that the caller has initialised.

The order of things: the output folder is claimed, the plan made or found, the tokenizer found or trained, copies found
(``dedup``), what is left of the items encoded and written, and the manifest made of the records of all items.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.dataset.dataset import TOKENIZER_NAME, load_tokenizer, save_tokenizer
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.preprocessing import deduplication, ray_dataflow, resume_state, stages
from pipeline.preprocessing.encode_documents import add_counts
from pipeline.preprocessing.ray_dataflow import Parallelism
from pipeline.preprocessing.resume_state import RunRecord
from pipeline.preprocessing.stages import EncodeJob
from pipeline.preprocessing.tokenizer_training import learn, read_layouts
from pipeline.sources import plan as plan_module
from pipeline.sources.sources import Source
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import Folder
from pipeline.tokenizer import bpe

_PARTS_PER_ITEM = 2  # an item that turns out larger than so many times what was planned goes on in another shard

logger = logging.getLogger(__name__)


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


def finished(config: TokenizeConfig, output: Folder) -> Manifest | None:
    """The manifest, if ``output`` holds all shards of this config already; needs no Ray.

    Raises UserError where the folder was begun with other settings or other input.
    """
    if resume_state.read_run(output) is None:
        return None
    fingerprint = bpe.Tokenizer.from_file(config.tokenizer).fingerprint if config.tokenizer else None
    return resume_state.finished(config, output, resume_state.settings_of(config, fingerprint))


def tokenize(config: TokenizeConfig, output: Folder) -> Summary:
    """Write the shards of ``config.source`` to ``output``, or what is left of them, and the manifest.

    Raises UserError for what the user can mend, whichever worker met it; the same call then goes on.
    """
    start = time.perf_counter()
    given = bpe.Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
    settings = resume_state.settings_of(config, given.fingerprint if given else None)
    source = resume_state.find_source(config.source, output)
    run = RunRecord(source=config.source, pinned=source.pinned, settings=settings, inputs=tuple(source.inputs))
    resume_state.claim(output, run)
    items = _plan(config, source, output)
    tokenizer = _prepare_tokenizer(config, given, source, output)
    parallelism = Parallelism.of(config)
    job = EncodeJob(
        output=str(output),
        tokenizer=ray_dataflow.share(tokenizer),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        settings=json.dumps(settings, sort_keys=True),
        val_fraction=config.val_fraction,
        part_bytes=_PARTS_PER_ITEM * config.item_bytes,
        skip_damaged=config.skip_bad_files,
        num_items=len(items),
        partitions=_find_duplicates(config, items, output, parallelism) if config.dedup == "exact" else 0,
    )
    keys = [job.key(item) for item in items]
    records = resume_state.read_all_records(output, keys, tokenizer.vocab_size)
    left = [item for item, record in zip(items, records, strict=True) if record is None]
    del records
    encode_start = time.perf_counter()
    text_bytes = tokens = 0
    steps: ray_dataflow.Stages = [(stages.encode, {"job": job}), (stages.write, {"job": job})]
    for row in ray_dataflow.run_items(left, steps, parallelism, title="tokenize"):
        text_bytes += row.figures["text_bytes"]
        tokens += row.figures["tokens"]
    encode_seconds = time.perf_counter() - encode_start
    return Summary(
        manifest=_finish(run, tokenizer, keys, output),
        num_items=len(items),
        num_items_done=len(left),
        text_bytes=text_bytes,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        encode_seconds=encode_seconds,
    )


def _plan(config: TokenizeConfig, source: Source, output: Folder) -> list[WorkItem]:
    """The work items that the folder was begun with, or new ones, noted in it."""
    items = resume_state.read_plan(output)
    if items is not None:
        logger.info("the plan of %s work items is there from an earlier run", f"{len(items):,}")
        return items
    damage: Damage | None = [] if config.skip_bad_files else None
    items = plan_module.make_plan(
        read_layouts(source, config.text_column, damage),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        limit_documents=config.limit_documents,
        limit_bytes=config.limit_bytes,
    )
    if not sum(item.size_bytes for item in items):
        raise UserError(f"source {source} holds no text")
    resume_state.write_plan(output, items, damage or [])
    return items


def _prepare_tokenizer(
    config: TokenizeConfig, given: bpe.Tokenizer | None, source: Source, output: Folder
) -> bpe.Tokenizer:
    """The tokenizer of the run, in the output folder: given, made by an earlier run, or trained now."""
    if given:
        tokenizer = given
        save_tokenizer(output, tokenizer)
    elif output.size(TOKENIZER_NAME) is not None:
        tokenizer = load_tokenizer(output)
        logger.info("tokenizer %s/%s is there from an earlier run", output, TOKENIZER_NAME)
    else:
        training = TrainTokenizerConfig(
            source=config.source,
            text_column=config.text_column,
            vocab_size=config.vocab_size,
            sample_bytes=config.sample_bytes,
            val_fraction=config.val_fraction,
            item_bytes=config.item_bytes,
            num_workers=config.num_workers,
            download_workers=config.download_workers,
            cache_bytes=config.cache_bytes,
            skip_bad_files=config.skip_bad_files,
        )
        tokenizer = learn(training, source, output).tokenizer
        save_tokenizer(output, tokenizer)
    bpe.warm_up()  # compiled here once, not in every worker at the same time
    return tokenizer


def _find_duplicates(
    config: TokenizeConfig, items: Sequence[WorkItem], output: Folder, parallelism: Parallelism
) -> int:
    """Note which documents are copies of earlier ones; returns the number of files that say so."""
    left = [item for item in items if output.size(deduplication.hashes_name(item.index)) is None]
    arguments = {"output": str(output), "skip_damaged": config.skip_bad_files}
    for _ in ray_dataflow.run_items(left, [(stages.hash_documents, arguments)], parallelism, title="find copies"):
        pass
    sizes = [output.size(deduplication.hashes_name(item.index)) or 0 for item in items]
    partitions = deduplication.num_partitions(sum(map(deduplication.num_documents, sizes)))
    search = {"output": str(output), "num_items": len(items), "partitions": partitions}
    ray_dataflow.run_rows(
        [str(partition) for partition in range(partitions)], stages.search_duplicates, search, parallelism
    )
    return partitions


def _finish(run: RunRecord, tokenizer: bpe.Tokenizer, keys: list[str], output: Folder) -> Manifest:
    """Gather the records of all items into the manifest, and write it."""
    parts = resume_state.read_all_records(output, keys, tokenizer.vocab_size)
    records = [record for item_parts in parts if item_parts is not None for record in item_parts]
    if None in parts:
        raise UserError(f"shards vanished from {output} while the job ran; run the same command again")
    skipped = resume_state.total_skipped(records)
    counts = (np.array(record.lengths, np.int64) for record in records)
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        settings=run.settings,
        inputs=tuple(entry.manifest_entry() for entry in run.inputs),
        shards=tuple(entry for record in records for entry in record.shards),
        skipped=skipped,
        damaged=(*resume_state.read_plan_damage(output), *(entry for record in records for entry in record.damaged)),
        document_lengths=tuple(functools.reduce(add_counts, counts, np.zeros(0, np.int64)).tolist()),
    )
    if not manifest.shards:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in skipped.items()) or "none at all"
        raise UserError(f"source {run.source} holds no document that could be used ({reasons})")
    resume_state.remove_others(output, {entry.name for entry in manifest.shards})
    for name in (*output.names(deduplication.HASHES), *output.names(deduplication.DUPLICATES)):
        output.delete(name)
    output.remove_leftovers()
    manifest.save(output)
    return manifest
