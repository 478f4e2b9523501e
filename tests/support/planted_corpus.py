"""A small source with planted junk, near-copies and evaluation questions, and what every stage must make of it.

What becomes of a text follows from how it is made, not from the code under test: jobs/tokenize.py with ``FLAGS`` and
the questions must keep ``kept``, in that order, and count ``skipped``.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.data import TokenizeConfig
from tests.support.filter_texts import COMMON

FLAGS = ["--filters", "gopher", "c4", "fineweb", "--mask_personal_data", "--dedup=minhash"]
"""Of jobs/tokenize.py; --decontaminate needs the file."""
STOP_WORDS = ("the", "of", "and", "that")
NEAR, CONTAMINATED = "near-duplicate", "contaminated"
COPIES = 18
JUNK = {
    "gopher: min_words": 5,
    "gopher: min_stop_words": 4,
    "gopher: max_bullet_lines": 3,
    "gopher: max_repeated_lines": 6,
    "gopher: min_alphabetic_words": 2,
    "c4: lorem_ipsum": 2,
    "c4: curly_bracket": 4,
    "c4: min_sentences": 3,
    "fineweb: max_short_lines": 3,
}
"""Rule -> documents that break it."""
ADDRESSES = "Write to Jane.Doe+{number}@mail.example.org or to the host 8.8.{number}.4 of them."
MASKED = "Write to email@example.com or to the host 192.0.2.1 of them."
BOILERPLATE = ["This site uses cookies to be good.", "Please enable Javascript to go on.", "Read more"]


@dataclass(frozen=True)
class PlantedCorpus:
    """Texts in the order of the plan, and what becomes of them."""

    texts: list[str]
    kept: list[str]
    """What the shards hold."""
    skipped: dict[str, int]
    """Reason -> documents, as in the manifest."""
    questions: list[str]
    listed: list[tuple[int, int]]
    """(number of the text from 0, number of the question from 1), as in contaminated.jsonl."""

    def parquet(self, files: int) -> dict[str, bytes]:
        """The texts in as many files, each of row groups of seven."""
        size = -(-len(self.texts) // files)
        found = {}
        for number in range(files):
            sink = pa.BufferOutputStream()
            part = pa.table({"text": self.texts[number * size : (number + 1) * size]})
            pq.write_table(part, sink, row_group_size=7, write_statistics=False)
            found[f"{number:02d}.parquet"] = sink.getvalue().to_pybytes()
        return found

    def question_lines(self) -> bytes:
        return "".join(json.dumps({"id": f"q{n}", "question": q}) + "\n" for n, q in enumerate(self.questions)).encode()

    def write(self, folder: Path, files: int = 3) -> TokenizeConfig:
        """Source and questions on disk, and settings that take every stage."""
        (folder / "raw").mkdir(parents=True)
        for name, content in self.parquet(files).items():
            (folder / "raw" / name).write_bytes(content)
        (folder / "questions.jsonl").write_bytes(self.question_lines())
        return TokenizeConfig(
            source=str(folder / "raw"),
            output=str(folder / "out"),
            filters=("gopher", "c4", "fineweb"),
            mask_personal_data=True,
            dedup="minhash",
            decontaminate=(str(folder / "questions.jsonl"),),
            vocab_size=300,
            val_fraction=0.0,
            item_bytes=12_000,
            num_workers=2,
        )


class _Writer:
    """Makes texts of its own words."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.greek = ["".join(self.choose.choices("αεηικλμνοπρστυ", k=4 + n % 4)) for n in range(200)]
        self.words = ["".join(self.choose.choices("etaoinshrdlucmfwyp", k=5 + n % 5)) for n in range(900)]

    def sentence(self, end: str = ".") -> str:
        """Fourteen words, of which one is a stop word."""
        words = [
            self.choose.choice(STOP_WORDS),
            *self.choose.choices(self.words, k=9),
            *self.choose.choices(COMMON, k=4),
        ]
        self.choose.shuffle(words)
        return " ".join(words).capitalize() + end

    def lines(self, count: int = 12, end: str = ".") -> list[str]:
        return [self.sentence(end) for _ in range(count)]

    def good(self, *more: str) -> str:
        """A text that breaks no rule, with some lines more in its middle."""
        lines = self.lines()
        return "\n".join([*lines[:6], *more, *lines[6:]])

    def junk(self, rule: str) -> str:
        """A text that breaks this rule and none before it."""
        makers: dict[str, Callable[[], str]] = {
            "gopher: min_words": lambda: "\n".join(self.lines(3)),
            "gopher: min_stop_words": lambda: "\n".join(
                " ".join(self.choose.choices(self.greek, k=14)) + "." for _ in range(9)
            ),
            "gopher: max_bullet_lines": lambda: "\n".join(f"- {line}" for line in self.lines()),
            "gopher: max_repeated_lines": lambda: "\n".join([*self.lines(5), *[self.sentence()] * 7]),
            "gopher: min_alphabetic_words": lambda: "\n".join(f"{line} {'12 %% 34 ++ ' * 3}" for line in self.lines()),
            "c4: lorem_ipsum": lambda: self.good("Lorem ipsum dolor sit amet."),
            "c4: curly_bracket": lambda: self.good("if (x) { return y; } and that is it."),
            "c4: min_sentences": lambda: "\n".join(self.lines(end="")),
            "fineweb: max_short_lines": lambda: "\n".join(self._short_lines()),
        }
        return makers[rule]()

    def _short_lines(self) -> list[str]:
        return [
            f"{self.choose.choice(STOP_WORDS)} {' '.join(self.choose.choices(self.words, k=3))}."[-30:]
            for _ in range(24)
        ]

    def changed(self, text: str) -> str:
        """A near-copy: other case (but for stop words), punctuation and accents, and another last word."""
        words = [word.title() if len(word) > 4 else word for word in text.replace(".", "!").split(" ")]
        return " ".join([*words[:-1], self.choose.choice(self.words) + "."]).replace("a", "á")


def planted_corpus(seed: int = 1) -> PlantedCorpus:
    """119 texts: the first of every kind in random order, then the copies among others."""
    writer = _Writer(seed)
    questions = [" ".join(writer.choose.choices(writer.words, k=16)) for _ in range(4)]
    good = [writer.good() for _ in range(40)]
    begin = [(text, text) for text in good]
    begin += [_with_boilerplate(writer) for _ in range(5)]
    begin += [_masked(writer, number) for number in range(5)]
    begin += [(writer.junk(rule), rule) for rule, count in JUNK.items() for _ in range(count)]
    begin += [(writer.good(f"They ask: {questions[n % 3]}?"), CONTAMINATED) for n in range(7)]
    begin += [("\n".join(f"- {questions[0]}." for _ in range(9)), "gopher: max_bullet_lines")]  # rules come first
    writer.choose.shuffle(begin)
    end = [(writer.changed(text), NEAR) for text in good[:COPIES]]
    end += [(next(text for text, fate in begin if fate == CONTAMINATED), NEAR)]  # and so do copies
    end += [(text, text) for text in (writer.good() for _ in range(10))]
    writer.choose.shuffle(end)
    return _as_corpus([*begin, *end], questions)


def _masked(writer: _Writer, number: int) -> tuple[str, str]:
    text = writer.good(ADDRESSES.format(number=number))
    return text, text.replace(ADDRESSES.format(number=number), MASKED)


def _with_boilerplate(writer: _Writer) -> tuple[str, str]:
    text = writer.good(*BOILERPLATE)
    return text, "\n".join(line for line in text.split("\n") if line not in BOILERPLATE)


def _as_corpus(fates: Sequence[tuple[str, str]], questions: list[str]) -> PlantedCorpus:
    reasons = {*JUNK, NEAR, CONTAMINATED}
    return PlantedCorpus(
        texts=[text for text, _ in fates],
        kept=[fate for _, fate in fates if fate not in reasons],
        skipped=dict(sorted(Counter(fate for _, fate in fates if fate in reasons).items())),
        questions=questions,
        listed=[
            (number, next(n for n, question in enumerate(questions, 1) if question in text))
            for number, (text, fate) in enumerate(fates)
            if fate == CONTAMINATED
        ],
    )
