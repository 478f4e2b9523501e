"""Speed of the rules for documents on one core: documents and MB a second, by set of rules.

    python benchmarks/filters.py --corpus FOLDER [--megabytes 20] [--runs 3]

The first documents of the corpus, from memory, one process, sets of rules in turns, by the processor's time, which
others on the machine lengthen less than the clock's; the median of the runs, the lowest and the highest behind. Every
set is alone, so each document is looked at by it. MB is 10^6 bytes of UTF-8 text.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.decontamination.evaluation_sets import EvaluationSets, Question
from pipeline.filters.rules import Rules, filtered

BATCH_BYTES = 2_000_000  # of text that are looked at together, as in a work item
SETS = {
    "gopher": Rules(groups=("gopher",)),
    "c4": Rules(groups=("c4",)),
    "fineweb": Rules(groups=("fineweb",)),
    "gopher c4 fineweb": Rules(groups=("gopher", "c4", "fineweb")),
    "mask_personal_data": Rules(mask_personal_data=True),
    "languages en": Rules(languages=("en",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    batches = list(first_documents(arguments.corpus, int(arguments.megabytes * 1e6)))
    documents = sum(map(len, batches))
    megabytes = sum(len(text.as_buffer()) for batch in batches for text in batch) / 1e6
    print(f"{documents:,} documents, {megabytes:.1f} MB", flush=True)
    work: dict[str, Callable[[], int]] = {
        name: functools.partial(count_kept, batches, rules) for name, rules in SETS.items()
    }
    sets = questions(batches)
    work["decontaminate"] = lambda: documents - sum(len(sets.overlaps(batch)) for batch in batches)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    kept = {}
    for function in work.values():
        function()  # compiled
    for _ in range(arguments.runs):
        for name, function in work.items():
            start = time.process_time()
            kept[name] = function()
            seconds[name].append(time.process_time() - start)
    for name, own in seconds.items():
        speeds = sorted(megabytes / value for value in own)
        middle = statistics.median(speeds)
        print(
            f"{name}: {middle:.1f} ({speeds[0]:.1f}-{speeds[-1]:.1f}) MB/s, {documents / megabytes * middle:,.0f} "
            f"documents/s, keeps {kept[name] / documents:.3f}",
            flush=True,
        )


def count_kept(batches: list[pa.Array], rules: Rules) -> int:
    return sum(map(len, filtered(batches, rules, Counter())))


def first_documents(corpus: Path, num_bytes: int) -> Iterator[pa.Array]:
    """Batches of some MB of the corpus, ``num_bytes`` together."""
    for path in sorted(corpus.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(500, columns=["text"]):
            texts: Any = batch["text"].drop_null().cast(pa.large_string())
            yield texts
            num_bytes -= texts.nbytes
            if num_bytes <= 0:
                return


def questions(batches: list[pa.Array]) -> EvaluationSets:
    """10,000 questions of 60 words, as many as HellaSwag has: from the text backwards, so that hardly any is in it."""
    words = [word for batch in batches for text in batch.to_pylist() for word in text.split()][: 10_000 * 60]
    words.reverse()
    texts = [" ".join(words[start : start + 60]) for start in range(0, len(words), 60)]
    return EvaluationSets.of([Question("made", number, "", (text,)) for number, text in enumerate(texts, 1)])


if __name__ == "__main__":
    main()
