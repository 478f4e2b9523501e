"""Rules against datatrove's filters on made-up texts (decisions.json), each rule alone, bounds, masking, own rules."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.filters import c4, fineweb, gopher
from pipeline.filters.personal_data import masked
from pipeline.filters.rules import GROUPS, Rules, filtered
from pipeline.filters.words import first_broken
from tests.support.filter_texts import digest, texts

DECISIONS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "decisions.json").read_text(encoding="utf-8"))
ROWS = [(text, row) for text, row in zip(texts(len(DECISIONS)), DECISIONS, strict=True)]
NAMES = {  # datatrove's names of our rules
    "gopher_short_doc": "min_words",
    "gopher_below_avg_threshold": "min_mean_word_length",
    "gopher_above_avg_threshold": "max_mean_word_length",
    "gopher_too_many_hashes": "max_hashes_per_word",
    "gopher_too_many_ellipsis": "max_ellipses_per_word",
    "gopher_too_many_bullets": "max_bullet_lines",
    "gopher_too_many_end_ellipsis": "max_ellipsis_lines",
    "gopher_below_alpha_threshold": "min_alphabetic_words",
    "gopher_enough_stop_words": "min_stop_words",
    "dup_para_frac": "max_repeated_paragraphs",
    "dup_para_char_frac": "max_repeated_paragraph_characters",
    "dup_line_frac": "max_repeated_lines",
    "dup_line_char_frac": "max_repeated_line_characters",
    **{f"top_{length}_gram": f"max_top_{length}_gram" for length in (2, 3, 4)},
    **{f"duplicated_{length}_n_grams": f"max_repeated_{length}_grams" for length in range(5, 11)},
    "lorem_ipsum": "lorem_ipsum",
    "curly_bracket": "curly_bracket",
    "too_few_sentences": "min_sentences",
    "line_punct_ratio": "min_lines_with_terminal_mark",
    "short_line_ratio": "max_short_lines",
    "char_dup_ratio": "max_repeated_line_characters",
    "list_ratio": "max_line_ends_per_word",
}
QUALITY = list(gopher.BOUNDS)[: list(gopher.BOUNDS).index("min_stop_words") + 1]


def ours(name: str, text: str) -> str | None:
    if name == "c4":
        return c4.kept_text(text, c4.BOUNDS)[1]
    if name == "fineweb":
        return first_broken(fineweb.measured(text, fineweb.BOUNDS), fineweb.BOUNDS)
    off = [rule for rule in gopher.BOUNDS if (rule in QUALITY) != (name == "gopher_quality")]
    bounds = gopher.BOUNDS | dict.fromkeys(off)
    return first_broken(gopher.measured(text, bounds), bounds)


@pytest.mark.parametrize("name", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_decisions_are_datatroves(name: str) -> None:
    wrong = [
        (text[:80], row.get(name), found)
        for text, row in ROWS
        if (found := ours(name, text)) != (NAMES[row[name]] if name in row else None)
    ]
    assert not wrong


def test_the_texts_are_those_that_were_decided_on() -> None:
    assert len(ROWS) == 380 and all(digest(text) == row["text"] for text, row in ROWS)


def test_the_texts_break_every_rule_but_one() -> None:
    seen = {NAMES[row[name]] for _, row in ROWS for name in row if name not in {"text", "c4_text"}}
    switches = {"min_words_per_line", "max_word_length", "terminal_marks", "citations", "javascript", "policies"}
    rules = {rule for group in GROUPS.values() for rule in group.BOUNDS} - switches - {"short_line_length"}
    assert rules - seen == {"max_words"}
    words = "the good people of here " * 30
    bounds = gopher.BOUNDS | {"max_words": 149}
    assert first_broken(gopher.measured(words, bounds), bounds) == "max_words"


def test_lines_that_c4_leaves_are_datatroves() -> None:
    rows = [(text, row) for text, row in ROWS if "c4" not in row]
    assert len(rows) > 100 and any(row["c4_text"] != row["text"] for _, row in rows)
    for text, row in rows:
        assert digest(c4.kept_text(text, c4.BOUNDS)[0]) == row["c4_text"]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("policies", "This site uses cookies to be good."),
        ("javascript", "Please enable Javascript to go on."),
        ("min_words_per_line", "Two words."),
        ("terminal_marks", "a line without an end"),
        ("max_word_length", "a long " + "x" * 1001 + "."),
    ],
)
def test_each_line_rule_of_c4_by_itself(rule: str, line: str) -> None:
    rest = "\n".join(f"It is the sentence number {number}." for number in range(6))
    assert c4.kept_text(f"{rest}\n{line}", c4.BOUNDS) == (rest, None)
    assert c4.kept_text(f"{rest}\n{line}", c4.BOUNDS | {rule: None})[0] == f"{rest}\n{line}"


def test_sentences_are_counted() -> None:
    texts = {"One. Two! Three?": 3, 'He said "Yes." Then more': 2, "no mark": 1, "3.14 is it.": 1, "Wait... what?": 2}
    assert {text: c4.sentences(text) for text in texts} == texts


def test_bounds_are_set_and_switched_off() -> None:
    text = "the good people of here and there have it. " * 2
    assert Rules(groups=("gopher",)).apply(text) == (text, "gopher: min_words")
    loose = ("gopher.min_words=10", *(f"gopher.max_top_{length}_gram=off" for length in (2, 3, 4)))
    loose += tuple(f"gopher.max_repeated_{length}_grams=off" for length in range(5, 11))
    assert Rules(groups=("gopher",), bounds=loose).apply(text) == (text, None)
    for entry in ("gopher.min_word=3", "min_words=3", "gopher.min_words", "gopher.min_words=few", "other.x=1"):
        with pytest.raises(UserError, match=r"filter_bounds has .*; (there are|give)|names no bound"):
            Rules(groups=("gopher",), bounds=(entry,))
    with pytest.raises(UserError, match="each must be one of gopher, c4, fineweb"):
        Rules(groups=("gofer",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@mail.example.org.", "write to email@example.com."),
        ("a@b is none, nor @name or a@b.", "a@b is none, nor @name or a@b."),
        ("8.8.8.8 and 10.0.0.1, 127.0.0.1, 256.1.1.1", "192.0.2.1 and 10.0.0.1, 127.0.0.1, 256.1.1.1"),
        ("version 1.2.3.4.5 and 08.8.8.8", "version 1.2.3.4.5 and 08.8.8.8"),
        ("żółw@sklep.pl 93.184.216.34:80", "email@example.com 192.0.2.1:80"),
    ],
)
def test_personal_data_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(masked(text)) == masked(text)


def test_a_long_line_of_signs_takes_no_time() -> None:
    """Patterns with a bound on every repetition; without it these take minutes."""
    for part in ("a.", "a@", "1.", "a@a.", "-"):
        masked(part * 50_000)


def test_own_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text("def no_cats(text):\n    return 'cat' if 'cat' in text else None\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    dropped: Counter[str] = Counter()
    arrays = [pa.array(["a dog", "a cat"], pa.large_string()), pa.array(["cat"], pa.large_string())]
    kept = list(filtered(arrays, Rules(own=("my_rules:no_cats",)), dropped))
    assert [array.to_pylist() for array in kept] == [["a dog"]]
    assert dropped == {"my_rules:no_cats: cat": 2}
    for path in ("my_rules", "my_rules:none", "no_module_x:f", ":", "my_rules:__name__"):
        with pytest.raises(UserError, match="own rule"):
            Rules(own=(path,)).apply("x")


@pytest.mark.parametrize("seed", range(4))
def test_runs_of_words_are_counted_as_plain_python_counts_them(seed: int) -> None:
    choose = random.Random(seed)
    few = [choose.choice("abcdefgh") * choose.randrange(1, 6) for _ in range(choose.choice([2, 5, 12, 40]))]
    for count in (1, 2, 4, 11, 60, 300):
        words = [choose.choice(few) for _ in range(count)]
        text = " ".join(words)
        expected = {}
        for length in (2, 3, 4):
            if runs := [" ".join(words[start : start + length]) for start in range(count - length + 1)]:
                run, number = Counter(runs).most_common(1)[0]
                expected[f"max_top_{length}_gram"] = len(run) * number / len(text)
        for length in range(5, 11):
            expected[f"max_repeated_{length}_grams"] = repeated_characters(words, length) / len(text)
        found = dict(gopher.measured(text, gopher.BOUNDS))
        assert {name: found[name] for name in found if name in expected} == expected
        assert [name for name in found if name.endswith(("gram", "grams"))] == list(expected)


def repeated_characters(words: list[str], length: int) -> int:
    seen: set[tuple[str, ...]] = set()
    characters = start = 0
    while start + length <= len(words):
        run = tuple(words[start : start + length])
        if run in seen:
            characters += sum(map(len, run))
            start += length
        else:
            seen.add(run)
            start += 1
    return characters
