"""Whatever lies in a folder is read or counted, or is a sentence: random trees with links, odd names and damage.

GPT25_FUZZ_SECONDS is how long it goes on (600 s), GPT25_FUZZ_SEED where it begins; a failure names its seed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from tests.support.trees import FOLDERS, LINES, ODD, PACKED, TABLES, file_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
PAGE = b"<!DOCTYPE html><html><body>log in</body></html>"
BAD_LINES = (
    b'{"url": "no text"}\n',
    b'["a"]\n',
    b'{"text": 5}\n',
    b"{\n",
    b'{"text": "\\ud83d"}\n',
    b'{"text": ' + b"9" * 5000 + b"}\n",
)


@dataclass
class Made:
    """What was put into a folder."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    """Name of every sound file -> its documents, which occur nowhere else."""
    stand_ins: set[str] = field(default_factory=set)
    """Names of pointers and web pages in place of a file; a web page may be a text."""


def make_tree(base: Path, choose: random.Random) -> Made:
    made = Made()
    suffixes = choose.sample([*TABLES, *LINES, ".txt"], k=choose.randrange(1, 6))
    folders = [base / folder for folder in choose.sample(FOLDERS, k=choose.randrange(1, 6))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(choose.randrange(1, 12)):
        suffix = choose.choice(suffixes)
        suffix += choose.choice([*PACKED, ""]) if suffix not in TABLES[:3] else ""
        shown_suffix = suffix.upper() if choose.random() < 0.2 else suffix
        path = choose.choice(folders) / f"{choose.choice(['part', '_part', '.part', 'ü', 'a b'])}{number}{shown_suffix}"
        texts = [f"document {number}.{row} {choose.random()}" for row in range(1 if suffix.startswith(".txt") else 3)]
        content = file_of(suffix, texts)
        shown = path.relative_to(base).as_posix()
        if choose.random() < 0.25:
            content = spoil(content, suffix, choose)
            if content == POINTER or (content == PAGE and not suffix.startswith(".txt")):
                made.stand_ins.add(shown)
        else:
            made.texts[shown] = texts
        path.write_bytes(content)
    for name in choose.sample(ODD, k=choose.randrange(0, 4)):
        (choose.choice(folders) / name).write_bytes(b"words beside the data")
    for number in range(choose.randrange(0, 4)):
        add_link(base, choose, number)
    return made


def spoil(content: bytes, suffix: str, choose: random.Random) -> bytes:
    kind = choose.randrange(6)
    if kind == 0:
        return POINTER
    if kind == 1:
        return PAGE
    if kind == 2 and suffix in LINES:
        return content + choose.choice(BAD_LINES)
    if kind == 3:
        return content[: choose.randrange(len(content))]
    if kind == 4:
        return choose.randbytes(choose.randrange(200))
    at = choose.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << choose.randrange(8))]) + content[at + 1 :]


def add_link(base: Path, choose: random.Random, number: int) -> None:
    there = [path for path in base.rglob("*") if not path.is_symlink()]
    target = choose.choice([*there, base, base.parent, Path("nowhere.jsonl"), Path("self.txt"), base.parent / "pool"])
    suffix = "".join(Path(target).suffixes) if Path(target).is_file() else choose.choice(["", ".jsonl", ".md"])
    (base / f"{choose.choice(['link', '_link'])}{number}{suffix}").symlink_to(target)


def check(base: Path, made: Made) -> str:
    """What happened, in a word; every sound file is read, or counted, or a sentence refuses the whole."""
    skipped: Counter[str] = Counter()
    damaged: list[dict[str, str]] = []
    try:
        source = find(str(base))
        items = make_plan(source.layouts("text", None, damaged), text_column="text", item_bytes=10**6)
        texts = {
            text for item in items for part in read_item(item, skipped, None, damaged) for text in part.to_pylist()
        }
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    read = {entry.name for entry in source.inputs}
    noted = " ".join(entry["name"] for entry in damaged)
    for name, wanted in made.texts.items():
        if name in read:
            assert set(wanted) <= texts or name in noted, name
        else:
            assert source.ignored, name
    for name in made.stand_ins & read:
        assert name in noted, name
    units, has_linked_folders = units_in(base)
    counted = len(read) + sum(entry.files for entry in source.ignored) + len(source.problems)
    assert counted >= len(units) if has_linked_folders else counted == len(units), (counted, sorted(units))
    return "damaged" if damaged else "read"


def units_in(base: Path) -> tuple[set[str], bool]:
    """Files and links to files, those in a hidden folder as one; and whether links to folders are among them."""
    units, has_linked_folders = set(), False
    for path in base.rglob("*"):
        if path.is_dir():
            has_linked_folders |= path.is_symlink()
            continue
        parts = path.relative_to(base).parts
        ends = [end for end, part in enumerate(parts, 1) if part[0] == "." or (part[0] == "_" and "=" not in part)]
        units.add("/".join(parts[: ends[0]] if ends else parts))
    return units, has_linked_folders


def run(seeds: range, base: Path, seconds: float) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for seed in seeds:
        folder = base / f"tree{seed}"
        (folder / "in").mkdir(parents=True)
        (folder / "pool").mkdir()
        (folder / "pool/p.jsonl").write_bytes(b'{"text": "from the pool"}\n')
        made = make_tree(folder / "in", random.Random(seed))
        try:
            outcomes[check(folder / "in", made)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}; the tree is in {folder}") from error
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        if time.monotonic() > end:
            break
    return outcomes


def test_some_trees(tmp_path: Path) -> None:
    outcomes = run(range(150), tmp_path, 10**9)
    assert sum(outcomes.values()) == 150 and min(outcomes[word] for word in ("read", "damaged", "refused")) > 5


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_trees(tmp_path: Path) -> None:
    seconds = float(os.environ.get("GPT25_FUZZ_SECONDS", "600"))
    first = int(os.environ.get("GPT25_FUZZ_SEED", "1000"))
    outcomes = run(range(first, first + 10**9), tmp_path, seconds)
    logging.getLogger(__name__).info("%d trees: %s", sum(outcomes.values()), outcomes)
    assert min(outcomes[word] for word in ("read", "damaged", "refused")) > 0
