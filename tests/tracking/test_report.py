"""The report of a run says what its journal and summary say, shows text as text, and needs no other file."""

from __future__ import annotations

import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]  # it brings no types
import pytest
from playwright.sync_api import sync_playwright

from pipeline.storage.folders import open_folder
from pipeline.tracking import report

BEGIN = 1_790_000_000_000
HOUR = 3_600_000
FINGERPRINT = "ab" * 32


def make_entries() -> list[dict[str, Any]]:
    """Two hours on four workers, an interruption, one hour on two."""
    source = {"source": "s3://bucket/data", "fingerprint": FINGERPRINT, "profile": {"tokens": 1_234_567}}
    entries: list[dict[str, Any]] = [
        {"kind": "start", "time": BEGIN},
        {"kind": "params", "time": BEGIN, "values": {"d_model": 768, "lr": 0.0018, "price_per_hour": 2.5}},
        {"kind": "tags", "time": BEGIN, "values": {"workers": "4", "commit": "c0ffee", "hardware.gpu": "H100 <80GB>"}},
        {"kind": "inputs", "time": BEGIN, "values": [{"name": "d", "context": "training", **source}]},
    ]
    for step in range(1, 101):
        values = {"train/loss": 10 / step, "train/lr": 1e-3, "train/grad_norm": 1.0, "perf/tokens_per_second": 1000.0}
        values |= {"perf/mfu": 0.4, "perf/step_seconds": 2.0, "perf/data_wait_seconds": 0.1}
        entries.append({"kind": "metrics", "time": BEGIN + step * HOUR // 50, "step": step, "values": values})
    later = BEGIN + 10 * HOUR
    entries += [
        {"kind": "start", "time": later},
        {"kind": "tags", "time": later, "values": {"workers": "2"}},
        {"kind": "metrics", "time": later, "step": 100, "values": {"val/loss": 3.0, "eval/hellaswag_acc_norm": 0.3}},
        {"kind": "sample", "time": later + HOUR, "step": 100, "prompt": "<b>", "text": "<script>alert(1)</script> ż"},
    ]
    return entries


class Page(HTMLParser):
    """Tags that are open, texts, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    summary: dict[str, Any] = {
        "steps": 100,
        "tokens_seen": 52_428_800,
        "parameters": 123_551_232,
        "first_loss": 10.8,
        "last_loss": 3.1,
    }
    summary |= {"val_loss": 3.12, "val_tokens": 10_485_760, "checkpoint": "/runs/x/checkpoints/step-000100"}
    (folder / "summary.json").write_text(json.dumps(summary | {"peak_memory_gib": 20.0}))
    scores = {"val_loss": 3.11, "val_tokens": 50_000_000, "hellaswag_acc_norm": 0.36, "hellaswag_acc": 0.31}
    (folder / "evaluation.json").write_text(json.dumps(scores | {"hellaswag_questions": 10_042}))
    return folder


def test_the_page_says_what_was_told(run: Path) -> None:
    assert report.write_pages(open_folder(run), make_entries()) == ["curves.png", "report.html"]
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " | ".join(page.texts)
    for words in (
        "my run",
        "123,551,232 parameters, 52,428,800 tokens in 100 steps",
        "10.8000 → 3.1000",
        "3.1200 on 10,485,760 tokens",
        "3.1100 on 50,000,000 tokens",
        "0.3600 acc_norm, 0.3100 acc, on 10,042 questions",
        "Beside published results",
        "this model | 0.0524 B | 3.1100 | 0.3600 |",
        "GPT-2.5, 124M, its author's | 10.49 B | 3.3041 (own test file) | 0.3059",
        f"s3://bucket/data: 1,234,567 tokens; sha256 {FINGERPRINT}",
        "1,000",
        "40.0% of the devices' peak",
        "5.0% of a step",
        "3:00:00",
        "interruptions | 1",
        "$25.00 at $2.50 per worker and hour",  # 2 hours x 4 workers + 1 hour x 2 workers
        "c0ffee",
        "generate.py --checkpoint /runs/x/checkpoints/step-000100",
    ):
        assert words in text, words


def test_a_val_loss_with_the_document_mask_says_so(run: Path) -> None:
    masked: list[dict[str, Any]] = [{"kind": "params", "time": BEGIN, "values": {"document_mask": True}}]
    scores = {"val_loss": 3.11, "val_tokens": 50_000_000, "document_mask": True}
    for entries, found, count in (
        (make_entries(), {}, 0),
        (make_entries() + masked, {}, 1),
        (make_entries(), scores, 1),
    ):
        open_folder(run).write("evaluation.json", [json.dumps(found).encode()])
        report.write_pages(open_folder(run), entries)
        page = (run / "report.html").read_text(encoding="utf-8")
        assert page.count("tokens, each seeing its own document alone (document_mask)") == count


def test_text_is_text_and_nothing_is_fetched(run: Path) -> None:
    report.write_pages(open_folder(run), make_entries())
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.seen and "<script>alert(1)</script> ż" in page.texts
    assert "H100 <80GB>" in page.texts
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [1400, 390])
def test_long_names_do_not_widen_the_page(run: Path, width: int) -> None:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    values = {"checkpoint": "/runs/" + "long" * 30, "lr": 0.0018}
    report.write_pages(open_folder(run), [*make_entries(), {"kind": "params", "time": BEGIN, "values": values}])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((run / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        too_wide = "[...document.querySelectorAll('.recipe div')].filter(it => it.scrollWidth > it.clientWidth).length"
        assert page.locator(".recipe div").count() and page.evaluate(too_wide) == 0
        browser.close()


def test_without_a_known_peak_the_page_has_speed_and_no_mfu(run: Path) -> None:
    entries = make_entries()
    for entry in entries:
        if entry["kind"] == "metrics":
            entry["values"].pop("perf/mfu", None)
    report.write_pages(open_folder(run), entries)
    text = " | ".join(Page((run / "report.html").read_text(encoding="utf-8")).texts)
    assert "MFU" not in text and "5.0% of a step" in text


def test_a_run_that_has_told_little_has_a_page_too(tmp_path: Path) -> None:
    assert report.write_pages(open_folder(tmp_path), []) == ["report.html"]
    assert report.write_pages(open_folder(tmp_path), make_entries()[:3]) == ["report.html"]
    for name in ("train/loss", "perf/tokens_per_second", "perf/data_wait_seconds"):
        point = {"kind": "metrics", "time": BEGIN, "step": 1, "values": {name: 1.0}}
        report.write_pages(open_folder(tmp_path), [*make_entries()[:3], point])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "img" not in page.seen and "c0ffee" in page.texts


def test_smoothing_is_a_moving_average_that_begins_at_the_first_value() -> None:
    """Against pandas' exponential window with its correction of the start."""
    values = [5.0 + (-1) ** step * 0.5 - step / 50 for step in range(100)]
    expected = pandas.Series(values).ewm(alpha=0.2, adjust=True).mean()
    assert report.smoothed(values) == pytest.approx(list(expected))
    assert report.smoothed([3.0, math.nan, 3.0]) == [3.0, 3.0, 3.0]
    assert report.smoothed([math.inf, 2.0]) == [math.inf, 2.0]
