"""Near-duplicates: our signatures, pairs and components beside datatrove's and datasketch's, on one core each.

    python benchmarks/near_duplicates.py --corpus FOLDER --peer_python PYTHON [--peer_parts 6]

PYTHON: the interpreter of an environment that has datatrove (0.10.1 needs xxhash below 4), datasketch, spacy and
pyarrow. The text is some parts of the corpus with planted copies, in which a run of words at the end is replaced, so
that their similarity to the document that they were made of lies between 0.5 and 1.0; it is computed exactly, from the
words that split() gives. All get the same scheme, 14 bands of 8 hashes over runs of five words, and each a process of
its own with one thread. Time is that of everything from text in memory to the clusters of documents that are copies of
each other; datatrove reads and writes its files, as it always does. MB is 10^6 bytes of UTF-8 text.

Recall is the share of planted copies that are in a cluster with their document, beside what the formula says. Precision
is the share of the documents left out that are similar to another one of their cluster by 0.5 and by 0.7, without case,
punctuation and the digits of numbers. Each hashes in its own way, so that clusters of their own signatures differ where
chance decides; at the end both peers get our signatures, and then every cluster must be the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.deduplication import near
from pipeline.deduplication.minhash import Scheme, sign

PEERS = ("datasketch", "datatrove")
BATCH_BYTES = 2_000_000  # of text that are signed together, as in a work item
_WORD = re.compile(r"[^\W\d_]+|\d+")
MOST_COMPARED = 200  # documents of a cluster that one of them is compared with


class Found(NamedTuple):
    """What one of them took and found."""

    seconds: float
    cpu_seconds: float
    clusters: list[list[int]]
    """Documents that are copies of each other; those without a copy are in none."""
    peak_megabytes: float


class Material(NamedTuple):
    """Texts with planted copies among them."""

    texts: list[str]
    planted: list[tuple[int, int, float]]
    """(document, copy, similarity) of each copy."""

    @property
    def megabytes(self) -> float:
        return sum(len(text.encode()) for text in self.texts) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--peer_python", help="interpreter with datatrove, datasketch, spacy and pyarrow")
    parser.add_argument("--parts", type=int, default=6, help="files of the corpus")
    parser.add_argument("--peer_parts", type=int, default=6, help="of them, those whose text the peers hash, too")
    parser.add_argument("--copies", type=int, default=3000, help="planted copies")
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours, of which the median counts")
    arguments = parser.parse_args()
    paths = sorted(arguments.corpus.glob("*.parquet"))[: arguments.parts]
    peers = PEERS if arguments.peer_python else ()
    rounds: list[tuple[list[Path], tuple[str, ...]]] = [(paths, ("texts", "keys"))]
    if arguments.peer_parts < len(paths):
        rounds = [(paths, ("keys",)), (paths[: arguments.peer_parts], ("texts",))]
    for chosen, given in rounds:
        others = [(peer, each) for each in given for peer in peers]
        compare(plant(texts_of(chosen), arguments.copies), others, arguments)


def compare(material: Material, others: list[tuple[str, str]], arguments: argparse.Namespace) -> None:
    """Print what ours and the others take and find; others: peers, each with texts or keys."""
    print(f"{len(material.texts):,} documents, {material.megabytes:.1f} MB; load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ids = list(map(str, range(len(material.texts))))
        pq.write_table(pa.table({"text": material.texts, "id": ids}), f"{folder}/texts.parquet")
        own = in_process(Path(folder), arguments.repeats)
        report("ours", material, own)
        for peer, given in others:
            found = theirs(peer, given, Path(folder), arguments.peer_python)
            if given == "keys":
                print(f"{peer} with our signatures: {in_common(own, found)}", flush=True)
                continue
            report(peer, material, found)
            ratio, cpu_ratio = found.seconds / own.seconds, found.cpu_seconds / own.cpu_seconds
            print(
                f"  ours is {ratio:.1f} times as fast, by the processor's time {cpu_ratio:.1f}; {in_common(own, found)}"
            )


def texts_of(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if text]


def plant(texts: list[str], count: int) -> Material:
    """The texts with copies behind them."""
    choose = random.Random(11)
    material = Material(list(texts), [])
    long_ones = [row for row, text in enumerate(texts) if 80 <= len(text.split()) <= 2000]
    for row in choose.sample(long_ones, min(count, len(long_ones))):
        words = texts[row].split()
        wanted = choose.uniform(0.5, 1.0)
        kept = round(2 * wanted * (len(words) - 4) / (1 + wanted)) + 4
        others = (re.sub(r"\W", "", choose.choice(words)) for _ in range(len(words) - kept))  # for all of them one word
        copy = words[:kept] + [f"{other}{choose.choice('qxz')}x" for other in others]
        material.planted.append((row, len(material.texts), jaccard(runs(words), runs(copy))))
        material.texts.append(" ".join(copy))
    return material


def runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / max(1, len(one | other))


# ---- runs ------------------------------------------------------------------------------------------------------------


def in_process(folder: Path, repeats: int) -> Found:
    """Ours, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ours, (folder, repeats))


def ours(folder: Path, repeats: int) -> Found:
    """The median of some runs; the keys of all documents go to keys.npy."""
    texts = pq.read_table(folder / "texts.parquet", columns=["text"])["text"].cast(pa.large_string()).combine_chunks()
    near.warm_up()
    times = []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        keys, clusters = clusters_of(texts)
        times.append((time.perf_counter() - start, time.process_time() - start_cpu))
    np.save(folder / "keys.npy", keys)
    seconds, cpu_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    return Found(seconds, cpu_seconds, clusters, peak)


def clusters_of(texts: pa.Array) -> tuple[np.ndarray, list[list[int]]]:
    scheme = Scheme()
    rows = max(1, BATCH_BYTES * len(texts) // texts.nbytes)
    keys = np.concatenate([sign(texts.slice(begin, rows), scheme)[0] for begin in range(0, len(texts), rows)])
    content = near.keys_to_bytes(keys)
    read = [lambda begin, end: content[begin:end]]
    partitions = near.num_partitions(near.num_keys(len(content)))
    pairs = [near.find_pairs(*near.read_partition(read, number, partitions)) for number in range(partitions)]
    nodes, firsts = near.find_components(lambda: pairs)
    order = np.argsort(firsts, kind="stable")
    ends = np.flatnonzero(np.diff(firsts[order])) + 1
    return keys, [part.tolist() for part in np.split(nodes[order], ends)]


def theirs(peer: str, given: str, folder: Path, python: str) -> Found:
    """A peer in its own environment; given: texts, or keys for our signatures."""
    with tempfile.TemporaryDirectory() as own_folder:
        for path in folder.iterdir():
            os.link(path, f"{own_folder}/{path.name}")
        command = [python, str(Path(__file__).parent / "near_duplicates_peer.py"), peer, given, own_folder]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


# ---- what they found -------------------------------------------------------------------------------------------------


def report(name: str, material: Material, found: Found) -> None:
    """Print what a run of one of them took and found."""
    speed = f"{material.megabytes / found.seconds:.2f} MB/s"
    left_out = sum(len(cluster) - 1 for cluster in found.clusters)
    print(
        f"{name}: {found.seconds:.2f} s, {found.cpu_seconds:.2f} s of the processor, {speed}, "
        f"peak {found.peak_megabytes:,.0f} MB, {left_out:,} left out, {len(found.clusters):,} clusters, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    cluster_of = {row: number for number, cluster in enumerate(found.clusters) for row in cluster}
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        chosen = [pair for pair in material.planted if low <= pair[2] < low + 0.1 or (low == 0.9 and pair[2] >= 1)]
        recalled = sum(cluster_of.get(row, -1) == cluster_of.get(copy, -2) for row, copy, _ in chosen)
        expected = sum(Scheme().probability(similarity) for _, _, similarity in chosen)
        count = max(1, len(chosen))
        figures = f"recall {recalled / count:.3f} of {count} (formula {expected / count:.3f})"
        print(f"  similarity {low:.1f} to {low + 0.1:.1f}: {figures}")
    alike = [similarity for cluster in found.clusters for similarity in closest(material.texts, cluster)]
    shares = ", ".join(
        f"{sum(value >= low for value in alike) / max(1, len(alike)):.4f} at {low}" for low in (0.5, 0.7)
    )
    copies = {copy for _, copy, _ in material.planted}
    natural = sum(not copies.intersection(cluster) for cluster in found.clusters)
    print(f"  precision {shares}; {natural:,} clusters without a planted copy", flush=True)


def closest(texts: list[str], cluster: list[int]) -> list[float]:
    """Of every document of a cluster but the first, the similarity to the one that is most like it."""
    rows = sorted(cluster)

    @functools.cache
    def of_row(row: int) -> set[tuple[str, ...]]:
        return runs(["0" if word.isdigit() else word for word in _WORD.findall(texts[row].lower())])

    return [
        max(jaccard(of_row(row), of_row(other)) for other in rows[:MOST_COMPARED] if other != row) for row in rows[1:]
    ]


def in_common(one: Found, other: Found) -> str:
    first, second = ({frozenset(cluster) for cluster in found.clusters} for found in (one, other))
    if first == second:
        return f"all {len(first):,} clusters are the same"
    same, own, its = len(first & second), len(first - second), len(second - first)
    return f"{same:,} clusters are the same, {own:,} are ours alone, {its:,} its alone"


if __name__ == "__main__":
    main()
