"""A tokenizer from a sample of a source: counting as a Ray Data stage, merging here."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config.data import TrainTokenizerConfig
from pipeline.console import CountProgress
from pipeline.preprocessing import ray_dataflow, stages
from pipeline.sources import plan as plan_module
from pipeline.sources.sources import Layout, Source
from pipeline.sources.work_items import Damage
from pipeline.storage.folders import Folder
from pipeline.tokenizer import bpe
from pipeline.tokenizer import training as bpe_training

MERGED_AT_ONCE = 16  # counts of so many items, some MB each, wait in the driver

logger = logging.getLogger(__name__)


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


def learn(config: TrainTokenizerConfig, source: Source, output: Folder) -> Training:
    """Learn a tokenizer from a sample of ``source``: equal for any number of workers and any size of work items.

    ``output`` has been claimed by the caller (``ledger.claim``), who also saves the tokenizer.
    """
    bpe_training.warm_up()  # compiled here once, not in every worker at the same time
    start = time.perf_counter()
    counts, figures, skipped = _count(config, source, output)
    merge_start = time.perf_counter()
    logger.info("learning a tokenizer of %d ids from %d distinct pre-tokens", config.vocab_size, counts.table.num_rows)
    with CountProgress("merge", "merges") as progress:
        tokenizer = bpe_training.train_bpe(
            counts, config.vocab_size, config.special_tokens, progress.update_to, min_frequency=config.min_frequency
        )
    return Training(
        tokenizer=tokenizer,
        documents=figures["documents"],
        text_bytes=figures["text_bytes"],
        distinct_pretokens=counts.table.num_rows,
        skipped=dict(sorted(skipped.items())),
        count_seconds=merge_start - start,
        merge_seconds=time.perf_counter() - merge_start,
    )


def read_layouts(source: Source, text_column: str, damage: Damage | None) -> list[Layout]:
    """What every file of a source consists of, with a progress bar: of parquet files the footers are read.

    damage: where files that cannot be read are noted; None: they are an error.
    """
    with CountProgress("plan", "files", len(source.inputs)) as progress:
        return list(source.layouts(text_column, progress.add, damage))


def _count(
    config: TrainTokenizerConfig, source: Source, output: Folder
) -> tuple[bpe_training.PretokenCounts, Counter[str], Counter[str]]:
    """How often each pre-token occurs in the sample; documents and bytes of text; documents skipped, by reason."""
    items = plan_module.sample_plan(
        read_layouts(source, config.text_column, [] if config.skip_bad_files else None),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        sample_bytes=config.sample_bytes,
    )
    arguments = {"output": str(output), "val_fraction": config.val_fraction, "pattern": config.pattern}
    arguments["skip_damaged"] = config.skip_bad_files
    figures: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    parts: list[bpe_training.PretokenCounts] = []
    for row in ray_dataflow.run_items(
        items, [(stages.count, arguments)], ray_dataflow.Parallelism.of(config), title="count"
    ):
        figures.update({name: row.figures[name] for name in ("documents", "text_bytes")})
        skipped.update(row.figures["skipped"])
        table = pa.Table.from_struct_array(row.arrays["counts"]).cast(bpe_training.COUNTS_SCHEMA)
        parts.append(bpe_training.PretokenCounts(table=table, pattern=config.pattern))
        if len(parts) == MERGED_AT_ONCE:
            parts = [bpe_training.merge_counts(parts)]
    return bpe_training.merge_counts(parts), figures, skipped
