"""datatrove or datasketch on a folder with texts.parquet, for benchmarks/near_duplicates.py; prints a line of JSON.

It runs in an environment of its own, which has neither this project nor its dependencies. Both get 14 bands of 8 hashes
over runs of five words: datatrove with its own words (MinhashConfig's defaults), datasketch with those of split() in
lower case.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def with_datasketch(folder: Path) -> tuple[float, list[int]]:
    import pyarrow.parquet as pq
    from datasketch import MinHash, MinHashLSH

    texts = pq.read_table(folder / "texts.parquet", columns=["text"])["text"].to_pylist()
    start = time.perf_counter()
    index = MinHashLSH(num_perm=112, params=(14, 8))
    group: dict[int, int] = {}

    def root(row: int) -> int:
        while group.setdefault(row, row) != row:
            row = group[row]
        return row

    for row, text in enumerate(texts):
        words = text.lower().split()
        signature = MinHash(num_perm=112)
        signature.update_batch({" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))})
        for other in index.query(signature):
            first, second = sorted((root(other), root(row)))
            group[second] = first
        index.insert(row, signature)
    left_out = [row for row in group if root(row) != row]
    return time.perf_counter() - start, left_out


def with_datatrove(folder: Path) -> tuple[float, list[int]]:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig()
    reader = ParquetReader(str(folder), glob_pattern="*.parquet", text_key="text", id_key="id")
    removed = JsonlWriter(str(folder / "removed"), output_filename="${rank}.jsonl", compression=None)
    steps = [
        ([reader, MinhashDedupSignature(str(folder / "signatures"), config=config)], 1),
        ([MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)], config.num_buckets),
        ([MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)], 1),
        ([reader, MinhashDedupFilter(str(folder / "remove"), exclusion_writer=removed)], 1),
    ]
    start = time.perf_counter()
    for number, (pipeline, tasks) in enumerate(steps):
        logs = str(folder / f"logs-{number}")
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    seconds = time.perf_counter() - start
    files = sorted((folder / "removed").glob("*.jsonl"))
    return seconds, [int(json.loads(line)["id"]) for file in files for line in file.read_text().splitlines()]


def main() -> None:
    run = {"datasketch": with_datasketch, "datatrove": with_datatrove}[sys.argv[1]]
    seconds, left_out = run(Path(sys.argv[2]))
    status = Path("/proc/self/status").read_text()  # getrusage's would be at least that of the parent
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    print(json.dumps({"seconds": seconds, "left_out": left_out, "peak_megabytes": peak}))


if __name__ == "__main__":
    main()
