"""A process that makes shards of a source, without Ray, and prints the memory it took (test_tokenization_size.py)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pipeline.dataset.dataset import save_tokenizer
from pipeline.preprocessing import ray_dataflow, stages
from pipeline.preprocessing.rows import ItemRow
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import find
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.reading_process import memory_mb


def make_job(output: Path, tokenizer: Tokenizer, items: list[WorkItem], *, item_bytes: int) -> stages.EncodeJob:
    """What tokenization.tokenize tells its tasks; the folder is made."""
    folder = open_folder(output)
    folder.make()
    save_tokenizer(folder, tokenizer)
    return stages.EncodeJob(
        output=str(output),
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        settings="{}",
        val_fraction=0.005,
        part_bytes=2 * item_bytes,
        skip=(),
        num_items=len(items),
    )


def main(source: str, output: str, tokenizer: str, item_bytes: str) -> None:
    """All items, one after the other, as one worker has them."""
    items = make_plan(find(source).layouts("text"), text_column="text", item_bytes=int(item_bytes))
    job = make_job(Path(output), Tokenizer.from_file(tokenizer), items, item_bytes=int(item_bytes))
    stages.get_tokenizer(job.tokenizer).encode("kernels are loaded")
    before_mb, start = memory_mb("VmRSS"), time.perf_counter()
    text_bytes = tokens = 0
    for item in items:
        table = ItemRow.of(item).to_table()
        for result in ray_dataflow.in_turn(table, [(stages.encode, {"job": job}), (stages.write, {"job": job})]):
            row = ItemRow.from_table(result)
            row.raise_error()
            text_bytes += row.figures["text_bytes"]
            tokens += row.figures["tokens"]
    figures = {
        "items": len(items),
        "text_bytes": text_bytes,
        "tokens": tokens,
        "before_mb": round(before_mb),
        "peak_mb": round(memory_mb("VmHWM")),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
