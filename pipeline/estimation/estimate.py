"""From a plan and a sample to what the whole source takes: text, documents, tokens, seconds, dollars. Arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.estimation.sampling import READING, RULES, SourceSample


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A source in figures, as the plan has it."""

    item_bytes: Sequence[int]
    """Bytes of every work item, as the plan counts them."""
    stored_bytes: int
    """Bytes of the files as they are stored, compressed or not."""
    records: int | None
    """Rows, text files, modules; None where they would have to be read for that."""

    @property
    def planned_bytes(self) -> int:
        return sum(self.item_bytes)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a whole source will be, if it is like its sample."""

    text_bytes: float
    documents: float
    """Documents before rules and questions."""
    kept_documents: float
    tokens: float
    shard_bytes: float
    seconds_per_byte: float
    """Seconds of one core for each byte of text, all passes together."""
    shares: dict[str, float]
    """Stage -> its share of these seconds."""


def estimate(source: PlannedSource, sample: SourceSample, *, passes: int, bytes_per_token: int) -> Estimate | None:
    """What the source will be; None where the sample holds nothing to go by.

    Args:
        passes: how often the source is read and put to the rules: twice where copies are looked for.
        bytes_per_token: on disk.
    """
    if not sample.worked_bytes or not sample.planned_bytes:
        return None
    scale = source.planned_bytes / sample.planned_bytes
    records = source.records if source.records is not None else sample.records * scale
    documents = records * sample.documents / sample.records
    text_bytes = sample.text_bytes * scale
    tokens = text_bytes * sample.tokens / sample.worked_bytes
    seconds = {
        stage: timing.seconds / timing.text_bytes for stage, timing in sample.timings.items() if timing.text_bytes
    }
    seconds |= {stage: passes * seconds[stage] for stage in (READING, RULES) if stage in seconds}
    whole = sum(seconds.values())
    return Estimate(
        text_bytes=text_bytes,
        documents=documents,
        kept_documents=documents * sample.kept_documents / sample.worked_documents,
        tokens=tokens,
        shard_bytes=tokens * bytes_per_token,
        seconds_per_byte=whole,
        shares={stage: value / whole if whole else 0.0 for stage, value in seconds.items()},
    )


def seconds_on(workers: int, source: PlannedSource, expected: Estimate) -> float:
    """Seconds until the last work item is done, where each of ``workers`` takes the next item as soon as it is free."""
    per_planned = expected.seconds_per_byte * expected.text_bytes / source.planned_bytes
    free_at = [0.0] * min(workers, len(source.item_bytes))
    for num_bytes in source.item_bytes:
        heapq.heapreplace(free_at, free_at[0] + num_bytes * per_planned)
    return max(free_at)


def dollars(nodes: int, seconds: float, price_per_hour: float) -> float:
    """The price of ``nodes`` for so many seconds."""
    return nodes * seconds / 3600 * price_per_hour
