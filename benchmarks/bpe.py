"""Speed of the tokenizer against tiktoken and `tokenizers`, one thread each, in the same run.

    python benchmarks/bpe.py data/part-000.parquet --vocab vocab.json --merges merges.txt

Prints MB (10^6 bytes of UTF-8) per CPU-second, ours also for the first pass, in which every piece is new. With --vocab
and --merges (GPT-2's files) that vocabulary encodes, else one trained on the text. All three must give the same ids.
Reading parquet and compiling kernels are not counted; compiling is printed by itself.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers starts its threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tiktoken
import tokenizers

from pipeline.bpe import PATTERN, Tokenizer
from pipeline.bpe_training import count_pretokens, train_bpe, warm_up


def main() -> None:
    arguments = parse()
    texts = pa.chunked_array(
        [chunk for path in arguments.parquet for chunk in pq.read_table(path, columns=[arguments.column])[0].chunks]
    )
    megabytes = int(pc.sum(pc.binary_length(texts)).as_py() or 0) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB")
    seconds, _ = cpu(warm_up)
    print(f"compile or load kernels: {seconds:.1f} s")
    tokenizer = training(texts, megabytes, arguments.vocab_size, arguments.peer_bytes)
    if arguments.vocab:
        tokenizer = Tokenizer.from_gpt2(arguments.vocab, arguments.merges)
    encoding(tokenizer, texts, megabytes, arguments.peer_bytes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", nargs="+", type=Path, help="files with a column of texts")
    parser.add_argument("--column", default="text")
    parser.add_argument("--vocab", type=Path, help="GPT-2's vocab.json")
    parser.add_argument("--merges", type=Path, help="GPT-2's merges.txt")
    parser.add_argument("--vocab_size", type=int, default=50257, help="ids to train")
    parser.add_argument("--peer_bytes", type=int, default=5_000_000, help="bytes of text that the slower peers get")
    return parser.parse_args()


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, all threads, and the result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def sample(texts: pa.ChunkedArray, num_bytes: int) -> list[str]:
    """The first documents, num_bytes of them together."""
    chosen: list[str] = []
    for text in texts:
        if num_bytes <= 0:
            break
        chosen.append(text.as_py())
        num_bytes -= len(chosen[-1].encode())
    return chosen


def training(texts: pa.ChunkedArray, megabytes: float, vocab_size: int, peer_bytes: int) -> Tokenizer:
    """Train on everything, and against `tokenizers` on the sample."""
    seconds, counts = cpu(lambda: count_pretokens(texts))
    merging, tokenizer = cpu(lambda: train_bpe(counts, vocab_size))
    print(f"train {vocab_size} on {megabytes:.1f} MB: count {seconds:.2f} s ({megabytes / seconds:.0f} MB/s), ", end="")
    print(f"learn {merging:.2f} s, {counts.table.num_rows:,} distinct pieces")
    part = sample(texts, peer_bytes)
    size = min(vocab_size, 10_000)
    ours, _ = cpu(lambda: train_bpe(part, size))
    theirs, _ = cpu(lambda: peer_training(part, size))
    print(
        f"train {size} on {peer_bytes / 1e6:.1f} MB: "
        f"ours {ours:.2f} s, tokenizers {theirs:.2f} s: {theirs / ours:.1f} x"
    )
    return tokenizer


def peer_training(part: list[str], size: int) -> None:
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    peer.train_from_iterator(part, trainer)


def encoding(tokenizer: Tokenizer, texts: pa.ChunkedArray, megabytes: float, peer_bytes: int) -> None:
    """Everything with ours; the sample with the peers, which must give the same ids."""
    part = sample(texts, peer_bytes)
    part_megabytes = sum(len(text.encode()) for text in part) / 1e6
    passes = [cpu(lambda: tokenizer.encode_batch(texts)) for _ in range(4)]
    ids, offsets = passes[0][1]
    expected = ids[: offsets[len(part)]].tolist()
    first, best = megabytes / passes[0][0], megabytes / min(seconds for seconds, _ in passes)
    print(f"encode: ours {first:.0f} MB/s first pass, {best:.0f} best of four")
    for name, encode in peers(tokenizer):
        seconds, found = cpu(functools.partial(encode, part))
        speed = part_megabytes / seconds
        if [token for document in found for token in document] != expected:
            raise SystemExit(f"{name} gives other ids")
        print(f"encode: {name} {speed:.1f} MB/s: ours is {first / speed:.1f} x first pass, {best / speed:.1f} x best")


def peers(tokenizer: Tokenizer) -> Iterator[tuple[str, Callable[[list[str]], list[list[int]]]]]:
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    ranks = {tokenizer.decode_bytes([i]): i for i in ordinary}  # ids are ranks, in GPT-2's vocabulary as in ours
    tik = tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens)
    yield "tiktoken", lambda part: [tik.encode_ordinary(text) for text in part]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        fast = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    fast.encode_special_tokens = True
    yield "tokenizers", lambda part: [encoding.ids for encoding in fast.encode_batch_fast(part)]


if __name__ == "__main__":
    main()
