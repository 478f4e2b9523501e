"""A tokenizer from a sample of a source: pre-tokens are counted by Ray Data, and merges are learned here."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.data import TrainTokenizerConfig
from pipeline.console import CountProgress
from pipeline.preprocessing import ray_dataflow, stages
from pipeline.preprocessing.planning import document_rules, what_to_skip
from pipeline.preprocessing.progress import read_layouts
from pipeline.sources.plan import sample_plan
from pipeline.sources.sources import Source
from pipeline.storage.folders import Folder
from pipeline.tokenizer import bpe
from pipeline.tokenizer import training as bpe_training

MERGED_AT_ONCE = 16  # items, whose counts of some MB each wait in the driver

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """A trained tokenizer in figures (summary.json)."""

    documents: int
    """Documents counted, without those held out for validation."""
    text_megabytes: float
    """UTF-8 bytes of these documents / 10^6."""
    skipped: dict[str, int]
    """Reason -> documents left out."""
    distinct_pretokens: int
    merges: int
    vocab_size: int
    """Ids reached: fewer than asked for where min_frequency is above 1 and the text is short."""
    fingerprint: str
    """sha256 of the tokenizer, hexadecimal."""
    count_seconds: float
    """Reading and counting, including the seconds that Ray takes to start the first tasks."""
    merge_seconds: float
    ignored: Sequence[dict[str, Any]] = ()
    """Files that lay in the source and were not read: reason, number of files, an example."""

    @property
    def megabytes_per_second(self) -> float:
        """Text read and counted per second, over all workers."""
        return self.text_megabytes / self.count_seconds if self.count_seconds else 0.0


def learn(config: TrainTokenizerConfig, source: Source, output: Folder) -> tuple[bpe.Tokenizer, TrainingReport]:
    """Learn a tokenizer from a sample of ``source``: equal for any number of workers and any size of work items.

    ``output`` has been claimed by the caller (``resume_state.claim``), who also saves the tokenizer.
    """
    bpe_training.warm_up()  # compiled here once, not in every worker at the same time
    start = time.perf_counter()
    counts, figures, skipped = _count(config, source, output)
    merge_start = time.perf_counter()
    distinct_pretokens = counts.table.num_rows
    logger.info("learning a tokenizer of %d ids from %d distinct pre-tokens", config.vocab_size, distinct_pretokens)
    with CountProgress("merge", "merges") as progress:
        tokenizer = bpe_training.train_bpe(
            counts, config.vocab_size, config.special_tokens, progress.update_to, min_frequency=config.min_frequency
        )
    report = TrainingReport(
        documents=figures["documents"],
        text_megabytes=figures["text_bytes"] / 1e6,
        skipped=dict(sorted(skipped.items())),
        distinct_pretokens=distinct_pretokens,
        merges=tokenizer.vocab_size - 256 - len(config.special_tokens),
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        count_seconds=merge_start - start,
        merge_seconds=time.perf_counter() - merge_start,
        ignored=[entry.to_dict() for entry in source.ignored],
    )
    return tokenizer, report


def _count(
    config: TrainTokenizerConfig, source: Source, output: Folder
) -> tuple[bpe_training.PretokenCounts, Counter[str], Counter[str]]:
    """How often each pre-token occurs in the sample; numbers of documents and bytes; skipped documents by reason."""
    items = sample_plan(
        read_layouts(source, config, [] if config.skip_bad_files else None),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        sample_bytes=config.sample_bytes,
        rules=document_rules(config),
    )
    arguments: dict[str, Any] = {"output": str(output), "pattern": config.pattern, "skip": what_to_skip(config)}
    arguments["val"] = (config.val_fraction, config.val_split)
    figures: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    parts: list[bpe_training.PretokenCounts] = []
    for row in ray_dataflow.run_items(items, [(stages.count, arguments)], config, title="count"):
        figures.update({name: row.figures[name] for name in ("documents", "text_bytes")})
        skipped.update(row.figures["skipped"])
        table = pa.Table.from_struct_array(row.arrays["counts"]).cast(bpe_training.COUNTS_SCHEMA)
        parts.append(bpe_training.PretokenCounts(table=table, pattern=config.pattern))
        if len(parts) == MERGED_AT_ONCE:
            parts = [bpe_training.merge_counts(parts)]
    return bpe_training.merge_counts(parts), figures, skipped
