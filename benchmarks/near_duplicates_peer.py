"""datatrove or datasketch on a folder with texts.parquet, for benchmarks/near_duplicates.py; prints a line of JSON.

It runs in an environment of its own, which has neither this project nor its dependencies. Both get 14 bands of 8 hashes
over runs of five words: datatrove with its own words (MinhashConfig's defaults), datasketch with those of split() in
lower case. With ``keys`` neither hashes: both get our keys, (documents, 14) uint64 in keys.npy, and find the documents
that share one and their components.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Clusters = list[list[int]]


def with_datasketch(folder: Path) -> Clusters:
    import pyarrow.parquet as pq
    from datasketch import MinHash

    texts = pq.read_table(folder / "texts.parquet", columns=["text"])["text"].to_pylist()

    def signatures() -> Iterable[tuple[int, Any]]:
        for row, text in enumerate(texts):
            words = text.lower().split()
            signature = MinHash(num_perm=112)
            signature.update_batch({" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))})
            yield row, signature

    return datasketch_clusters(signatures(), bands=14, rows=8)


def with_datasketch_of_keys(folder: Path) -> Clusters:
    import numpy as np
    from datasketch import MinHash

    keys = np.load(folder / "keys.npy")
    signatures = (
        (row, MinHash(num_perm=14, hashvalues=own, scheme="affine64")) for row, own in enumerate(keys) if own[0]
    )
    return datasketch_clusters(signatures, bands=14, rows=1)  # 0: a document without words


def datasketch_clusters(signatures: Iterable[tuple[int, Any]], *, bands: int, rows: int) -> Clusters:
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    parents: dict[int, int] = {}

    def root(row: int) -> int:
        while parents.setdefault(row, row) != row:
            row = parents[row]
        return row

    for row, signature in signatures:
        for other in index.query(signature):
            first, second = sorted((root(other), root(row)))
            parents[second] = first
        index.insert(row, signature)
    return grouped((row, root(row)) for row in parents)


def grouped(cluster_of: Iterable[tuple[int, int]]) -> Clusters:
    clusters: dict[int, list[int]] = {}
    for row, cluster in cluster_of:
        clusters.setdefault(cluster, []).append(row)
    return list(clusters.values())


def with_datatrove(folder: Path) -> Clusters:
    from datatrove.pipeline.dedup import MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig()
    reader = ParquetReader(str(folder), glob_pattern="*.parquet", text_key="text", id_key="id")
    run_datatrove([reader, MinhashDedupSignature(str(folder / "signatures"), config=config)], folder)
    clusters = datatrove_clusters(folder, config)
    removed = JsonlWriter(str(folder / "removed"), output_filename="${rank}.jsonl", compression=None)
    run_datatrove([reader, MinhashDedupFilter(str(folder / "remove"), exclusion_writer=removed)], folder)
    return clusters


def with_datatrove_of_keys(folder: Path) -> Clusters:
    import numpy as np
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    keys = np.load(folder / "keys.npy")
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=1, hash_config=HashConfig(precision=64))
    for band in range(14):
        rows = np.flatnonzero(keys[:, band])
        records = np.empty(len(rows), [("key", "<u8"), ("row", "<u4")])
        records["key"], records["row"] = keys[rows, band] >> np.uint64(4), rows  # its hashes lie below 2**61 - 1
        place = folder / "signatures" / f"bucket_{band:03d}"
        place.mkdir(parents=True)
        (place / "00000.minhash.sig").write_bytes(np.sort(records, order=["key", "row"]).tobytes())
    return datatrove_clusters(folder, config)


def datatrove_clusters(folder: Path, config: Any) -> Clusters:
    import numpy as np
    from datatrove.pipeline.dedup import MinhashDedupCluster
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    signatures, buckets, found = (str(folder / name) for name in ("signatures", "buckets", "remove"))
    run_datatrove([MinhashDedupBuckets(signatures, buckets, config=config)], folder, tasks=config.num_buckets)
    run_datatrove([MinhashDedupCluster(buckets, found, config=config, save_cluster_id=True)], folder)
    pairs = np.fromfile(folder / "remove" / "000000.clusters", "<u4").reshape(-1, 2).tolist()
    return grouped((row, cluster) for row, cluster in pairs)


def run_datatrove(pipeline: list[Any], folder: Path, tasks: int = 1) -> None:
    from datatrove.executor.local import LocalPipelineExecutor

    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(logs)).run()


RUNS = {
    ("datasketch", "texts"): with_datasketch,
    ("datasketch", "keys"): with_datasketch_of_keys,
    ("datatrove", "texts"): with_datatrove,
    ("datatrove", "keys"): with_datatrove_of_keys,
}


def main() -> None:
    peer, given, folder = sys.argv[1:]
    start, start_cpu = time.perf_counter(), time.process_time()
    clusters = RUNS[peer, given](Path(folder))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    status = Path("/proc/self/status").read_text()  # getrusage's would be at least that of the parent
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "clusters": clusters, "peak_megabytes": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
