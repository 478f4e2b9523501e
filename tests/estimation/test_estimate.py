"""Time, tokens and dollars of a source from a plan and a sample, in figures worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.estimation.estimate import Estimate, PlannedSource, dollars, estimate, seconds_on
from pipeline.estimation.sampling import SourceSample, Timing

SOURCE = PlannedSource(item_bytes=[6_000_000, 3_000_000, 1_000_000], stored_bytes=2_000_000, records=None)


def sample(**changes: object) -> SourceSample:
    """A tenth of the source: 4 MB of text in 100 documents of 110 records; half of them went through the stages."""
    values: dict[str, object] = {
        "planned_bytes": 1_000_000.0,
        "text_bytes": 4_000_000,
        "documents": 100,
        "unread": Counter(null=10),
        "worked_documents": 50,
        "worked_bytes": 2_000_000,
        "dropped": Counter({"gopher: min_words": 10}),
        "kept_documents": 40,
        "kept_bytes": 1_500_000,
        "tokens": 500_000,
        "timings": {
            "reading": Timing(0.4, 4_000_000),
            "rules": Timing(0.6, 2_000_000),
            "encoding": Timing(0.1, 1_000_000),
        },
    }
    return SourceSample(**(values | changes))  # type: ignore[arg-type]


def test_the_whole_is_ten_times_the_sample() -> None:
    found = estimate(SOURCE, sample(), passes=1, bytes_per_token=2)
    assert found is not None
    assert found.text_bytes == 40_000_000
    assert found.documents == 1000 and found.kept_documents == 800
    assert found.tokens == 10_000_000 and found.shard_bytes == 20_000_000
    assert found.seconds_per_byte == pytest.approx(0.1e-6 + 0.3e-6 + 0.1e-6)
    assert found.shares == pytest.approx({"reading": 0.2, "rules": 0.6, "encoding": 0.2})


def test_known_records_are_taken_as_they_are() -> None:
    source = PlannedSource(item_bytes=SOURCE.item_bytes, stored_bytes=1, records=2200)
    found = estimate(source, sample(), passes=1, bytes_per_token=4)
    assert found is not None and found.documents == 2000 and found.kept_documents == 1600
    assert found.shard_bytes == 40_000_000


def test_copies_cost_a_second_pass_of_reading_and_rules() -> None:
    timings = sample().timings | {"copies": Timing(0.2, 2_000_000)}
    found = estimate(SOURCE, sample(timings=timings), passes=2, bytes_per_token=2)
    assert found is not None
    assert found.seconds_per_byte == pytest.approx(2 * (0.1e-6 + 0.3e-6) + 0.1e-6 + 0.1e-6)


@pytest.mark.parametrize("empty", [{"worked_bytes": 0, "worked_documents": 0}, {"planned_bytes": 0.0}])
def test_nothing_is_said_of_what_was_not_seen(empty: dict[str, object]) -> None:
    assert estimate(SOURCE, sample(**empty), passes=1, bytes_per_token=2) is None


@pytest.mark.parametrize(("workers", "seconds"), [(1, 10.0), (2, 6.0), (3, 6.0), (500, 6.0)])
def test_the_largest_item_bounds_the_time(workers: int, seconds: float) -> None:
    """One second for a planned megabyte: four bytes of text each, at 0.25 microseconds."""
    expected = Estimate(
        text_bytes=40_000_000,
        documents=1,
        kept_documents=1,
        tokens=1,
        shard_bytes=2,
        seconds_per_byte=0.25e-6,
        shares={},
    )
    assert seconds_on(workers, SOURCE, expected) == pytest.approx(seconds)
    even = PlannedSource(item_bytes=[100_000] * 100, stored_bytes=1, records=None)
    assert seconds_on(workers, even, expected) == pytest.approx(0.1 * -(-100 // workers))


def test_dollars() -> None:
    assert dollars(8, 1800, 0.5) == 2.0
    assert dollars(1, 0, 0.5) == 0.0
