"""The page about what rules do: counts of Rules.apply, examples whatever the order, text as text, no other file."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.filters import c4, gopher
from pipeline.filters.report import KEPT, Sample, histogram, render
from pipeline.filters.rules import Rules
from tests.support.filter_texts import texts

RULES = Rules(groups=("gopher", "c4", "fineweb"), bounds=("gopher.min_words=20",), mask_personal_data=True)


def sample_of(documents: list[str], rules: Rules = RULES) -> Sample:
    sample = Sample(rules)
    sample.add(documents)
    return sample


def test_decisions_are_those_of_the_rules() -> None:
    documents = texts(380)
    sample = sample_of(documents)
    assert sample.decisions == Counter(RULES.apply(text)[1] or KEPT for text in documents)
    assert sample.documents == 380 and sum(sample.lost.values()) == sum(map(len, documents)) == sample.characters
    assert len(sample.values["gopher", "min_words"]) == 380
    kept_by_gopher = [text for text in documents if not Rules(groups=("gopher",), bounds=RULES.bounds).apply(text)[1]]
    assert len(sample.values["fineweb", "max_short_lines"]) == sum(
        c4.kept_text(text, c4.BOUNDS)[1] is None for text in kept_by_gopher
    )


def test_the_page_does_not_depend_on_the_order_of_the_documents() -> None:
    documents = texts(300)
    page = render(sample_of(documents), source="s", counted={})
    random.Random(1).shuffle(documents)
    assert render(sample_of(documents), source="s", counted={}) == page
    assert len(page) < 400_000


def test_documents_are_text_on_a_page_that_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules_of_page.py").write_text("def rule(text):\n    return '<b>bad</b>' if 'bad' in text else None\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    documents = ["<script>alert(1)</script> \x00\x1b[31m \ud800 good", "<i>bad</i> " + "x" * 5000]
    page = render(
        sample_of(documents, Rules(own=("rules_of_page:rule",))),
        source="<u>source</u>",
        counted={"rules_of_page:rule: <b>bad</b>": 7, "null": 9},
    )
    assert not re.findall(r"<script|<b>|<u>|<i>|\x00|\x1b|https?://|src=|@import|url\(", page)
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;bad" in page and ">7<" in page and ">9<" not in page
    assert "x" * 500 in page and "x" * 601 not in page


def test_histograms() -> None:
    made = histogram("max_repeated_lines", [0.0] * 96 + [0.1, 0.2, 0.4, 9.0], 0.3)
    assert made.beyond == 0.02 and made.bound == "0.3" and made.bound_x is not None
    assert made.bars[0][2] == 80 and made.bars[-1][0] == 292.5
    assert histogram("min_words", [5, 5, 5], None).bound_x is None
    assert histogram("min_words", [5, 60], 50).beyond == 0.5
    assert [name for name, _ in gopher.measured("a", gopher.BOUNDS)][:2] == ["min_words", "max_words"]
