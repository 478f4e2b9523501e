"""Near-duplicates: our signatures, pairs and components beside datatrove's and datasketch's, on one core each.

    python benchmarks/near_duplicates.py --corpus FOLDER --peer_python PYTHON [--parts 2] [--copies 2000]

PYTHON: the interpreter of an environment that has datatrove, datasketch and pyarrow. The text is some parts of the
corpus with planted copies, in which a run of words at the end is replaced, so that their similarity to the document
that they were made of lies between 0.5 and 1.0; it is computed exactly, from the words that split() gives. All get the
same scheme, 14 bands of 8 hashes over runs of five words, and each one process. Time is that of everything from text in
memory to the list of documents to leave out; datatrove reads and writes its files, as it always does. Recall of planted
copies stands beside what the formula says, and precision is the share of documents left out that are similar to another
one by at least 0.5. MB is 10^6 bytes of UTF-8 text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.deduplication import exact, near
from pipeline.deduplication.minhash import Scheme, sign

PEERS = ("datasketch", "datatrove")
BATCH_BYTES = 2_000_000  # of text that are signed together, as in a work item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--peer_python", help="interpreter with datatrove, datasketch and pyarrow")
    parser.add_argument("--parts", type=int, default=2, help="files of the corpus for ours")
    parser.add_argument("--peer_documents", type=int, default=4000, help="documents for the peers, and ours again")
    parser.add_argument("--copies", type=int, default=2000, help="planted copies")
    arguments = parser.parse_args()
    paths = sorted(arguments.corpus.glob("*.parquet"))[: arguments.parts]
    texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if text]
    near.warm_up()
    report("ours, all parts", plant(texts, arguments.copies), ours)
    if arguments.peer_python:
        material = plant(texts[: arguments.peer_documents], arguments.copies)
        speed = report("ours", material, ours)
        for peer in PEERS:
            found = report(peer, material, lambda texts, peer=peer: theirs(peer, texts, arguments.peer_python))
            print(f"ours / {peer}: {speed / found:.1f}", flush=True)


def plant(texts: list[str], count: int) -> tuple[list[str], list[tuple[int, int, float]]]:
    """The texts with copies behind them, and (document, copy, similarity) of each copy."""
    choose = random.Random(11)
    all_texts, pairs = list(texts), []
    long_ones = [row for row, text in enumerate(texts) if 80 <= len(text.split()) <= 2000]
    for row in choose.sample(long_ones, min(count, len(long_ones))):
        words = texts[row].split()
        wanted = choose.uniform(0.5, 1.0)
        kept = round(2 * wanted * (len(words) - 4) / (1 + wanted)) + 4
        copy = words[:kept] + [f"{choose.choice(words)}{choose.choice('qxz')}x" for _ in range(len(words) - kept)]
        pairs.append((row, len(all_texts), jaccard(words, copy)))
        all_texts.append(" ".join(copy))
    return all_texts, pairs


def jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in (one, other))
    return len(first & second) / max(1, len(first | second))


def ours(texts: list[str]) -> tuple[float, set[int], float]:
    """Seconds, the documents left out, and the peak memory in MB."""
    array = pa.array(texts, pa.large_string())
    scheme = Scheme()
    start = time.perf_counter()
    rows = max(1, BATCH_BYTES * len(texts) // array.nbytes)
    keys = [sign(array.slice(begin, rows), scheme)[0] for begin in range(0, len(texts), rows)]
    content = near.keys_to_bytes(np.concatenate(keys))
    read = [lambda begin, end: content[begin:end]]
    partitions = near.num_partitions(near.num_keys(len(content)))
    pairs = [near.find_pairs(*near.read_partition(read, number, partitions)) for number in range(partitions)]
    copies = near.find_copies(lambda: pairs, 1)
    left_out = exact.rows_of_item([lambda begin, end: copies[begin:end]], 0, 1)
    seconds = time.perf_counter() - start
    return seconds, set(left_out.tolist()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def theirs(peer: str, texts: list[str], python: str) -> tuple[float, set[int], float]:
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"text": texts, "id": list(map(str, range(len(texts))))}), f"{folder}/texts.parquet")
        script = Path(__file__).parent / "near_duplicates_peer.py"
        command = [python, str(script), peer, folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], set(found["left_out"]), found["peak_megabytes"]


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def report(name: str, material: tuple[list[str], list[tuple[int, int, float]]], run: Any) -> float:
    """Print what a run of one of them gave; returns its MB/s."""
    texts, pairs = material
    seconds, left_out, peak = run(texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{name}: {len(texts):,} documents, {megabytes:.1f} MB, {seconds:.2f} s, {megabytes / seconds:.2f} MB/s, "
        f"peak {peak:,.0f} MB, {len(left_out):,} left out"
    )
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        chosen = [pair for pair in pairs if low <= pair[2] < low + 0.1 or (low == 0.9 and pair[2] >= 1)]
        # either one of the two may be the one that stays, or both follow a third
        recalled = sum(copy in left_out or document in left_out for document, copy, _ in chosen)
        expected = sum(Scheme().probability(similarity) for _, _, similarity in chosen)
        count = max(1, len(chosen))
        figures = f"recall {recalled / count:.3f} of {count} (formula {expected / count:.3f})"
        print(f"  similarity {low:.1f} to {low + 0.1:.1f}: {figures}")
    planted = {copy: similarity for _, copy, similarity in pairs}
    alike = sum(planted.get(row, 0) >= 0.5 for row in left_out)
    others = len(left_out) - sum(row in planted for row in left_out)
    print(f"  of them {alike:,} are planted copies of 0.5 or more, {others:,} the corpus' own documents")
    return megabytes / seconds


if __name__ == "__main__":
    main()
