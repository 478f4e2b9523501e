"""Speed of the data pipeline: parquet in, verified shards out, on a local Ray.

    python benchmarks/data_pipeline.py [SECTION...] --corpus FOLDER --vocab vocab.json --merges merges.txt [--json FILE]

Sections, all of them if none is named:
    job        the whole job against cores x the speed of one core without Ray; the corpus once, and many times over
    handover   one task doing all against the graph; files from a local hub against files of this disk
    peer       datatrove on the same files; --peer_python names the interpreter of an environment that has it
    items      thousands of files of one line: what an item costs, what the driver keeps

Repeats of what is compared take turns; a figure is a median, behind it the lowest and the highest. MB is 10^6 bytes of
UTF-8 text. `make bench-data` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cluster.ray_cluster import set_local_environment

set_local_environment()  # before any module imports ray

from benchmarks import data_handover, data_sections
from benchmarks.bpe_report import Section, machine
from benchmarks.data_material import Material
from pipeline.tokenizer.bpe import Tokenizer

SECTIONS = ("job", "handover", "peer", "items")


def main() -> None:
    arguments = parse()
    described = machine()
    print(*(f"{name}: {value}" for name, value in described.items()), sep="\n", flush=True)
    paths = tuple(sorted(arguments.corpus.glob("*.parquet")))
    if not paths:
        raise SystemExit(f"error: {arguments.corpus} has no files of parquet")
    done: list[Section] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        Tokenizer.from_gpt2(arguments.vocab, arguments.merges).save(tokenizer)
        material = Material(
            paths=paths,
            column=arguments.column,
            tokenizer=tokenizer,
            folder=Path(folder),
            num_workers=arguments.workers,
            repeats=arguments.repeats,
            peer_python=arguments.peer_python,
        )
        for name, make in sections(arguments, material).items():
            if not arguments.sections or name in arguments.sections:
                done.append(make())
                print(done[-1], f"load now: {os.getloadavg()[0]:.1f}", sep="\n", flush=True)
    print("\n== Targets", *(target for section in done for target in section.targets), sep="\n")
    if arguments.json:
        content = {"machine": described, "sections": [section.to_json() for section in done]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    add("--corpus", type=Path, required=True, help="folder of parquet files")
    add("--column", default="text")
    add("--vocab", type=Path, required=True, help="GPT-2's vocab.json")
    add("--merges", type=Path, required=True, help="GPT-2's merges.txt")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    add("--repeats", type=int, default=5)
    add("--copies", type=int, default=8, help="of the corpus, for a steady state")
    add("--items", type=int, default=25_000)
    add("--peer_python", help="interpreter of an environment that has datatrove (default: this one)")
    add("--folder", type=Path, help="where to write to (default: the system's folder for temporary files)")
    add("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    return arguments


def sections(arguments: argparse.Namespace, material: Material) -> dict[str, Callable[[], Section]]:
    """name -> the measurement."""
    return {
        "job": lambda: data_sections.job(material, arguments.copies),
        "handover": lambda: data_handover.handover(material, arguments.copies),
        "peer": lambda: data_sections.peer(material),
        "items": lambda: data_sections.items(material, arguments.items),
    }


if __name__ == "__main__":
    main()
