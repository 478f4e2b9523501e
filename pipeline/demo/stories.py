"""The text of the demo: stories by the rules of grammar.py, as JSON lines, and the best possible loss on them.

The n-th story is a function of the seed and n alone, on every machine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from pipeline.config.data import DemoConfig
from pipeline.dataset.dataset import open_data
from pipeline.dataset.shards import open_split
from pipeline.demo.grammar import Teller, tell
from pipeline.paths import resolve_output
from pipeline.storage.folders import open_folder


def stories(seed: int) -> Iterator[tuple[str, float]]:
    """Every story of this seed, without an end: its text, and -ln of its probability in nats."""
    number = 0
    while True:
        teller = Teller(Random(f"{seed}:{number}"))
        tell(teller)
        yield "".join(teller.parts), teller.nats
        number += 1


def write_stories(path: Path, *, num_bytes: int, seed: int) -> bool:
    """Write the first stories that hold ``num_bytes`` of text, a JSON line {"text": ...} each; False if it is there."""
    if path.exists():
        return False
    folder = open_folder(path.parent)
    folder.make()
    folder.write(path.name, _lines(num_bytes, seed))
    return True


def _lines(num_bytes: int, seed: int) -> Iterator[bytes]:
    for text, _ in stories(seed):
        if num_bytes <= 0:
            return
        num_bytes -= len(text.encode())
        yield json.dumps({"text": text}).encode() + b"\n"


def best_val_loss(config: DemoConfig, data: str) -> float | None:
    """The val loss, in nats per token, of a model that knows the rules and all of a story so far.

    Args:
        data: folder of the shards of these stories, as in --output of jobs/tokenize.py.

    Returns:
        None where there is no val set, or where it holds a text that is no story of this seed.
    """
    folder = resolve_output(data)
    tokenizer, manifest = open_data(folder)
    stream = open_split(folder, "val")
    if not len(stream):
        return None
    texts = tokenizer.decode(stream.read(0, len(stream))).split(tokenizer.end_of_text)
    number = manifest.documents("train") + manifest.documents("val")
    told = dict(itertools.islice(stories(config.story_seed), number))
    try:
        return sum(told[text] for text in texts if text) / len(stream)
    except KeyError:
        return None
