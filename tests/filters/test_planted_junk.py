"""A corpus of good documents with junk planted in it: what goes, by which rule, and what stays, word by word."""

from __future__ import annotations

import random
from collections import Counter

import pyarrow as pa
import pytest

from pipeline.filters.rules import Rules, filtered
from tests.support.language_texts import CODE, PARAGRAPHS

SUBJECTS = ["The baker", "A young doctor", "My neighbour", "The captain", "Our teacher", "The gardener", "A musician"]
DEEDS = [
    *("walked to the market in the morning", "wrote a long letter to an old friend", "repaired the roof before winter"),
    *("had to wait for the last train", "told us a story that nobody believed", "planted beans and onions with care"),
    *(
        "lost a key somewhere near the bridge",
        "learned the names of all the birds",
        "cooked soup for seven hungry guests",
    ),
    *("painted the door of the house green", "counted the ships that left the harbour", "slept until the bells rang"),
]
ENDS = [
    *("and came back late", "because the weather was kind", "as people do in that part of the country"),
    *("without saying a word", "while the others looked on", "and was pleased with it", "though it took all day"),
]


def good_documents() -> list[str]:
    """Forty stories of twelve sentences, which have no five words in common."""
    choose = random.Random(11)
    documents = []
    for _ in range(40):
        ends = [f" {end}." for end in ENDS] + ["."] * (len(DEEDS) - len(ENDS))
        choose.shuffle(ends)
        deeds = choose.sample(DEEDS, len(DEEDS))
        documents.append(
            " ".join(f"{choose.choice(SUBJECTS)} {deed}{end}" for deed, end in zip(deeds, ends, strict=True))
        )
    return documents


BOILERPLATE = "\n".join(
    ["This site uses cookies to make your visit better.", "Please read our privacy policy and the terms of use."] * 9
)
REPEATED = "\n".join([good_documents()[0].split(". ")[0] + "."] * 12 + [good_documents()[1]])
LIST = "\n".join(["Home", "About us", "Contact", "Products", "Prices", "Jobs", "Press", "Help", "Sign in", "Map"] * 6)
PROGRAM = "\n".join([CODE.replace("total", f"total_{number}") for number in range(12)])
FOREIGN = {code: text for code, text in PARAGRAPHS.items() if code != "en"}
JUNK = {"boilerplate": BOILERPLATE, "repeated lines": REPEATED, "list": LIST, "code": PROGRAM, **FOREIGN}


def run(rules: Rules) -> tuple[list[str], Counter[str]]:
    """What stays of good documents and junk in a mixed order, and what went by which rule."""
    texts = [*good_documents(), *JUNK.values()]
    random.Random(5).shuffle(texts)
    dropped: Counter[str] = Counter()
    kept = [
        text for array in filtered([pa.array(texts, pa.large_string())], rules, dropped) for text in array.to_pylist()
    ]
    return sorted(kept), dropped


def test_all_rules_together_leave_the_good_documents_as_they_are() -> None:
    kept, dropped = run(Rules(languages=("en",), groups=("gopher", "c4", "fineweb")))
    assert kept == sorted(good_documents())
    assert dropped.total() == len(JUNK)
    assert {f"language: {code}" for code in FOREIGN} <= dropped.keys()


def test_languages_alone_take_the_foreign_documents() -> None:
    kept, dropped = run(Rules(languages=("en", "de")))
    assert {f"language: {code}" for code in FOREIGN if code != "de"} <= dropped.keys()
    assert {*good_documents(), FOREIGN["de"], BOILERPLATE, REPEATED} <= set(kept)


@pytest.mark.parametrize(
    ("group", "goes"),
    [
        ("gopher", {"boilerplate", "repeated lines", "list", "code"}),
        ("c4", {"boilerplate", "list", "code"}),
        ("fineweb", {"boilerplate", "repeated lines", "list", "code"}),
    ],
)
def test_each_group_takes_its_junk(group: str, goes: set[str]) -> None:
    rules = Rules(groups=(group,))
    assert goes == {name for name in ("boilerplate", "repeated lines", "list", "code") if rules.apply(JUNK[name])[1]}
    assert [rules.apply(text)[1] for text in good_documents()] == [None] * 40
