"""Speed of the tokenizer against gigatoken, tiktoken, `tokenizers` and rustbpe, all in this process, one core each.

    python benchmarks/bpe.py [SECTION...] --corpus FOLDER --vocab vocab.json --merges merges.txt [--json FILE]

Sections: encode, threads, corpus, texts, training, compile; all of them if none is named. The folder holds files of
parquet with a column of texts. With --vocab and --merges (GPT-2's files) that vocabulary encodes, else one trained on
the first part. The process stays on one core (not in `threads`), the peers take one thread, and every id that a peer
gives is compared with ours: a difference ends the run. MB is 10^6 bytes of UTF-8, speeds are per CPU-second; a figure
is a median, behind it the lowest and the highest. `make bench` installs the peers and runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before the peers start their threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import bpe_encoding, bpe_learning, bpe_peers, bpe_pipeline
from benchmarks.bpe_report import Section, machine, measure
from benchmarks.bpe_texts import other_texts
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.training import train_bpe, warm_up

SECTIONS = ("encode", "threads", "corpus", "texts", "training", "compile")
MAX_PARTS = 6


def main() -> None:
    arguments = parse()
    cores = os.sched_getaffinity(0)
    core = max(cores) if arguments.core is None else arguments.core
    described = {**machine(), "pinned to": f"core {core}"}
    print(*(f"{name}: {value}" for name, value in described.items()), sep="\n", flush=True)
    pin({core})
    paths = sorted(arguments.corpus.glob("*.parquet"))[: arguments.parts]
    if len(paths) < 2:
        raise SystemExit(f"error: {arguments.corpus} has {len(paths)} files of parquet; at least two parts are needed")
    parts = [read(path, arguments.column, arguments.megabytes) for path in paths]
    seconds, _ = measure(warm_up)
    print(f"kernels compiled or loaded: {seconds.cpu:.1f} CPU s", flush=True)
    if arguments.vocab:
        tokenizer = Tokenizer.from_gpt2(arguments.vocab, arguments.merges)
    else:
        tokenizer = train_bpe(parts[0], arguments.vocab_sizes[0])
    done: list[Section] = []
    for name, make in sections(arguments, tokenizer, paths, parts, cores).items():
        if arguments.sections and name not in arguments.sections:
            continue
        pin(cores if name == "threads" else {core})
        done.append(make())
        print(done[-1], flush=True)
    finish(done, described, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    add("--corpus", type=Path, required=True, help="folder of parquet files, two at least")
    add("--column", default="text")
    add("--vocab", type=Path, help="GPT-2's vocab.json")
    add("--merges", type=Path, help="GPT-2's merges.txt")
    add("--parts", type=int, default=MAX_PARTS, help="files to read; the first warms up, the others are measured")
    add("--megabytes", type=float, default=float("inf"), help="of each part, for a short run; not in section corpus")
    add("--sample_megabytes", type=float, default=4.0, help="of each part for tiktoken and tokenizers")
    add("--text_megabytes", type=float, default=24.0, help="of each other text, cut into --parts parts")
    add("--vocab_sizes", type=int, nargs=2, default=(50257, 32000), help="ids to train on one part, on all parts")
    add("--repeats", type=int, default=5, help="of corpus, training, compile")
    add("--peer_repeats", type=int, default=1, help="of the peers in training: they take minutes")
    add("--locale", type=Path, default=Path("/usr/share/locale"), help="folder of gettext catalogues")
    add("--core", type=int, help="the core to stay on (default: the last one)")
    add("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    if (arguments.vocab is None) != (arguments.merges is None):
        parser.error("--vocab and --merges are GPT-2's two files; give both or none")
    return arguments


def pin(cores: set[int]) -> None:
    """Keep this process on these cores."""
    os.sched_setaffinity(0, cores)


def read(path: Path, column: str, megabytes: float) -> Any:
    """The texts of a part, in chunks as parquet gives them."""
    texts = bpe_peers.without_nulls(pq.read_table(path, columns=[column], use_threads=False)[0])
    return bpe_peers.first_documents(texts, megabytes * 1e6)


def sections(
    arguments: argparse.Namespace, tokenizer: Tokenizer, paths: list[Path], parts: list[Any], cores: set[int]
) -> dict[str, Callable[[], Section]]:
    """name -> the measurement."""
    sample_bytes, text_bytes = arguments.sample_megabytes * 1e6, int(arguments.text_megabytes * 1e6)
    repeats = arguments.repeats
    return {
        "encode": lambda: bpe_encoding.encode(tokenizer, parts, sample_bytes),
        "threads": lambda: bpe_encoding.threads(tokenizer, parts, cores),
        "corpus": lambda: bpe_pipeline.corpus(tokenizer, paths, arguments.column, repeats),
        "texts": lambda: bpe_encoding.texts(
            tokenizer,
            other_texts(english(parts, text_bytes), text_bytes, arguments.locale),
            len(parts),
            sample_bytes / 4,
        ),
        "training": lambda: bpe_learning.training(parts, tuple(arguments.vocab_sizes), repeats, arguments.peer_repeats),
        "compile": lambda: bpe_pipeline.compilation(tokenizer, repeats),
    }


def english(parts: list[Any], num_bytes: int) -> list[str]:
    """Documents of the corpus, about num_bytes of them."""
    texts = pa.chunked_array([chunk for part in parts for chunk in part.chunks])
    return bpe_peers.first_documents(texts, num_bytes).to_pylist()


def finish(done: list[Section], described: dict[str, str], file: Path | None) -> None:
    """All targets together, and the file."""
    print("\n== Targets", *(target for section in done for target in section.targets), sep="\n")
    if file:
        content = {"machine": described, "sections": [section.to_json() for section in done]}
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
