"""One core: files of parquet decoded, split, encoded and written as shards, without Ray and records.

A process of its own, started by data_material.run_bare; it says "ready", waits for a line, works, prints its figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.data import TokenizeConfig
from pipeline.dataset.shards import shard_parts
from pipeline.preprocessing.encode_documents import encode_parts
from pipeline.preprocessing.stages import use_system_memory
from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import Folder, open_folder
from pipeline.tokenizer.bpe import Tokenizer


def main(arguments: list[str]) -> None:
    number, paths, output, tokenizer_path, column, flush = arguments
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(number) % len(cores)]})
    config = TokenizeConfig()
    items = [
        item
        for path in json.loads(paths)
        for item in make_plan(find(path).layouts(column), text_column=column, item_bytes=config.item_bytes)
    ]
    folder, tokenizer = open_folder(output), Tokenizer.from_file(tokenizer_path)
    folder.make()
    use_system_memory()
    load_libraries(folder, Tokenizer.from_file(tokenizer_path), config)
    tokenizer.encode("The kernels are loaded.")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    num_bytes = sum(write(item, index, folder, tokenizer, config, flush=flush) for index, item in enumerate(items))
    print(json.dumps({"megabytes": num_bytes / 1e6, "seconds": time.perf_counter() - start}))


def load_libraries(folder: Folder, tokenizer: Tokenizer, config: TokenizeConfig) -> None:
    """A file of one line, with a tokenizer that is not used again: Arrow takes 0.2 s for its first computation."""
    path = Path(str(folder)) / "line.parquet"
    pq.write_table(pa.table({"text": ["The libraries are loaded."]}), path)
    for item in make_plan(find(str(path)).layouts("text"), text_column="text", item_bytes=config.item_bytes):
        write(item, 0, folder, tokenizer, config, flush="nothing")


def write(
    item: WorkItem, index: int, folder: Folder, tokenizer: Tokenizer, config: TokenizeConfig, *, flush: Any
) -> int:
    """The shards of an item; bytes of text in them."""
    num_bytes = 0
    arrays = read_item(item, Counter())
    parts = encode_parts(arrays, tokenizer, val_fraction=config.val_fraction, part_bytes=2 * config.item_bytes)
    for number, part in enumerate(parts):
        for split, ids in part.ids.items():
            if len(ids) == 0:
                continue
            content = shard_parts(ids, vocab_size=tokenizer.vocab_size)
            folder.write(f"{split}_{index:06d}-{number}.bin", content, flush=flush)
        num_bytes += sum(part.text_bytes.values())
    return num_bytes


if __name__ == "__main__":
    main(sys.argv[1:])
