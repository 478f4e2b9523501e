"""Messages: what foreign names and values put into them gives a terminal no orders and floods no log."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import console
from pipeline.console import MOST_CHARACTERS, PlainFormatter, format_rate, plain

ROOT = Path(__file__).resolve().parents[1]
ATTACK = "\x1b]0;owned\x07 \x1b[2Jhttps://me:SECRET@host/x\r\n\u202egpj.exe \u200b" + "A" * 100_000


@given(st.text())
def test_a_message_is_bounded_and_printable(text: str) -> None:
    shown = plain(text * 50)
    assert len(shown) <= MOST_CHARACTERS + 5
    assert all(character.isprintable() or character == "\u3000" or character.isspace() for character in shown)
    assert not {"\n", "\r", "\x1b", "\u202e"} & set(shown)


def test_a_rate_is_never_shown_as_nothing() -> None:
    rates = [52_000_000, 999_999, 310_000, 40, 0]
    assert [*map(format_rate, rates)] == ["52.0 MB/s", "1,000.0 kB/s", "310.0 kB/s", "0.1 kB/s", "not measured"]


def test_a_plain_message_stays_as_it_is() -> None:
    for text in ("shard data/żółw.bin is missing; put it back", "日本語 ½ 🙂", "hf://datasets/o/n@abc/x.parquet"):
        assert plain(text) == text


def test_an_attack() -> None:
    shown = plain(ATTACK)
    assert shown.startswith(r"\x1b]0;owned\x07 \x1b[2Jhttps://host/x\r\n\u202egpj.exe \u200bAAA")
    assert len(shown) <= MOST_CHARACTERS + 5


def test_a_log_line_is_a_line_and_a_table_keeps_its_lines() -> None:
    record = logging.LogRecord("pipeline", logging.INFO, "x.py", 1, "%s\n%s", ("a\x1b", "b" * 9999), None)
    first, second = PlainFormatter("%(message)s").format(record).split("\n")
    assert first == r"a\x1b" and len(second) <= MOST_CHARACTERS + 5


def test_a_job_prints_its_error_so() -> None:
    name = "x\x1b[31m\u202e" + "y" * 5000 + "https://me:SECRET@host"
    done = subprocess.run(
        [sys.executable, "jobs/tokenize.py", "--config", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and r"\x1b[31m\u202e" in done.stderr
    assert "\x1b" not in done.stderr and "SECRET" not in done.stderr and len(done.stderr) < 2100


@pytest.mark.parametrize(
    ("seconds", "shown", "lines"),
    [
        (3600.0, True, []),
        (0.0, True, ["scoring: 1 of 3 batches", "scoring: 2 of 3 batches", "scoring: 3 of 3 batches"]),
        (0.0, False, []),
    ],
)
def test_long_work_says_how_far_it_is(
    seconds: float, shown: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(console, "LOG_SECONDS", seconds)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert list(console.with_progress("abc", "scoring", "batches", shown=shown)) == ["a", "b", "c"]
    assert caplog.messages == lines
