"""One core: files of parquet decoded, split, encoded and written as shards, without Ray, records and flushes.

A process of its own, started by data_material.run_bare; it says "ready", waits for a line, works, prints its figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter

from pipeline.bpe import Tokenizer
from pipeline.config import TokenizeConfig
from pipeline.documents import encode_parts
from pipeline.pieces import WorkItem
from pipeline.plans import make_plan
from pipeline.readers import read_item
from pipeline.shards import shard_parts
from pipeline.sources import find
from pipeline.stages import use_system_memory
from pipeline.storage import Folder, open_folder


def main(number: str, paths: str, output: str, tokenizer_path: str, column: str) -> None:
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
    tokenizer.encode("The kernels are loaded.")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    num_bytes = sum(write(item, index, folder, tokenizer, config) for index, item in enumerate(items))
    print(json.dumps({"megabytes": num_bytes / 1e6, "seconds": time.perf_counter() - start}))


def write(item: WorkItem, index: int, folder: Folder, tokenizer: Tokenizer, config: TokenizeConfig) -> int:
    """The shards of an item; bytes of text in them."""
    num_bytes = 0
    arrays = read_item(item, Counter())
    parts = encode_parts(arrays, tokenizer, val_fraction=config.val_fraction, part_bytes=2 * config.item_bytes)
    for number, part in enumerate(parts):
        for split, ids in part.ids.items():
            content = shard_parts(ids, vocab_size=tokenizer.vocab_size)
            folder.write(f"{split}_{index:06d}-{number}.bin", content, flush="nothing")
        num_bytes += sum(part.text_bytes.values())
    return num_bytes


if __name__ == "__main__":
    main(*sys.argv[1:])
