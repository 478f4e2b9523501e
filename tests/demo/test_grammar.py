"""The stories of the demo: their choices can be read off the text, so their probability is exact."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

from pipeline.config.data import DemoConfig
from pipeline.demo.grammar import HEROES, LESSONS, LOVES, TROUBLES, Teller, tell
from pipeline.demo.stories import best_val_loss, stories, write_stories
from pipeline.errors import UserError
from pipeline.tokenizer.training import count_pretokens, train_bpe
from tests.support.shards import save_folder


class _NextChoice(Exception):  # noqa: N818  # no error
    """A story cannot go on without another choice among so many options."""


class Reader(Teller):
    """Repeats given choices, and ends where what is said is not the text or the choices do not suffice."""

    def __init__(self, text: str, choices: Sequence[int]) -> None:
        super().__init__(Random())
        self.text, self.choices = text, list(choices)
        self.probability = 1.0

    def pick(self, options: Sequence[str]) -> str:
        if not self.text.startswith("".join(self.parts)):
            raise ValueError
        if not self.choices:
            raise _NextChoice(len(options))
        index = self.choices.pop(0)
        weights = [1 / (number + 4) for number in range(len(options))]
        self.probability *= weights[index] / sum(weights)
        return options[index]


def readings(text: str, choices: tuple[int, ...] = ()) -> Iterator[float]:
    """The probability of every sequence of choices that tells exactly ``text``."""
    reader = Reader(text, choices)
    try:
        tell(reader)
    except ValueError:
        return
    except _NextChoice as missing:
        for index in range(missing.args[0]):
            yield from readings(text, (*choices, index))
        return
    if "".join(reader.parts) == text:
        yield reader.probability


@pytest.mark.parametrize("number", range(12))
def test_a_text_can_be_told_in_one_way_only_and_its_probability_is_exact(number: int) -> None:
    text, nats = next(itertools.islice(stories(3), number, None))
    (probability,) = readings(text)
    assert nats == pytest.approx(-math.log(probability))


def test_the_choices_are_drawn_with_their_weights() -> None:
    """Mean of -ln p over draws is the entropy of the choice, computed from the weights."""
    options = ["a", "b", "c"]
    teller = Teller(Random(7))
    drawn = [teller.pick(options) for _ in range(20_000)]
    total = 1 / 4 + 1 / 5 + 1 / 6
    shares = [1 / (4 * total), 1 / (5 * total), 1 / (6 * total)]
    assert [drawn.count(option) / 20_000 for option in options] == pytest.approx(shares, abs=0.02)
    assert teller.nats / 20_000 == pytest.approx(-sum(share * math.log(share) for share in shares), abs=0.01)


def test_every_kind_of_animal_has_as_many_different_names() -> None:
    names = [name for kind in HEROES for name in HEROES[kind].split()]
    assert len(set(names)) == len(names) == 6 * len(HEROES)
    assert len(LOVES) == 10 and len(TROUBLES) == 8 and len(LESSONS) == 4


def test_the_stories_are_the_same_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "folder/stories.jsonl"
    assert write_stories(path, num_bytes=3000, seed=1)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [text for text, _ in itertools.islice(stories(1), len(texts))]
    assert sum(map(len, texts)) >= 3000 > sum(map(len, texts[:-1]))
    path.write_text("mine")
    assert not write_stories(path, num_bytes=3000, seed=1) and path.read_text() == "mine"
    assert [path.name for path in path.parent.iterdir()] == ["stories.jsonl"]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="story_bytes is 0; it must be positive"):
        DemoConfig(story_bytes=0)


def test_the_best_loss_is_that_of_the_documents_in_the_val_shards(tmp_path: Path) -> None:
    told = list(itertools.islice(stories(5), 6))
    tokenizer = train_bpe(count_pretokens(pa.array([text for text, _ in told])), 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = [[tokenizer.eot_id, *tokenizer.encode(text)] for text, _ in told]
    tokens = {
        "train_0.bin": list(itertools.chain(*ids[:4])),
        "val_0.bin": list(itertools.chain(*ids[4:])),
    }
    manifest = save_folder(tmp_path, tokens, vocab_size=300)
    shards = tuple(
        dataclasses.replace(entry, documents=number) for entry, number in zip(manifest.shards, (4, 2), strict=True)
    )
    dataclasses.replace(
        manifest, tokenizer_fingerprint=tokenizer.fingerprint, eot_id=tokenizer.eot_id, shards=shards
    ).save(tmp_path)
    expected = (told[4][1] + told[5][1]) / len(tokens["val_0.bin"])
    assert best_val_loss(DemoConfig(story_seed=5), str(tmp_path)) == pytest.approx(expected)
    assert best_val_loss(DemoConfig(story_seed=6), str(tmp_path)) is None, "other stories"
