"""Writes tests/filters/decisions.json: what datatrove's filters decide on the texts of tests/support/filter_texts.py.

    python tools/make_filter_decisions.py tests/filters/decisions.json

It runs in an environment with datatrove (0.10.1 wrote the file). datatrove's words and sentences come from a language's
tokenizer; here words are what white space divides and sentences what stands behind a mark and white space, so that the
rules alone are compared. A row has the digest of the text, the decision of each filter that drops it, and the digest of
what C4's leaves of it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.support.filter_texts import digest, texts  # noqa: E402


def decisions(found: list[str]) -> list[dict[str, Any]]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition

    def words(text: str, _language: str) -> list[str]:
        return text.split()

    for module in (gopher_quality_filter, repetition, fineweb_quality_filter):
        setattr(module, "split_into_words", words)  # noqa: B010
    setattr(c4_filters, "split_into_sentences", lambda line, _: re.split(r"(?<=[.?!])[\"']?\s+", line))  # noqa: B010
    filters = {
        "gopher_quality": gopher_quality_filter.GopherQualityFilter(),
        "gopher_repetition": repetition.GopherRepetitionFilter(),
        "c4": c4_filters.C4QualityFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
    }
    rows = []
    for text in found:
        row: dict[str, Any] = {"text": digest(text)}
        for name, rule in filters.items():
            document = Document(text=text, id="")
            decision = rule.filter(document)
            if decision is not True:
                row[name] = decision[1]
            if name == "c4" and decision is True:
                row["c4_text"] = digest(document.text)
        rows.append(row)
    return rows


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) for row in decisions(texts(380))]
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
