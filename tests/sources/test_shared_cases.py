"""Troubles of real people, rebuilt by a script of ../shared/cases, whose list of expectations says what is right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.listing.selection import describe
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import find
from tests.conftest import shared_folder
from tests.support.texts import read_items

CASES = (
    *("suffix-case", "dangling-link", "text-beside-parquet", "zstd-long-window", "name-not-utf8", "gzip-members"),
    *("crlf-blank", "empty-parquet", "dotted-column", "link-loop", "utf16"),
    *("half-emoji", "missing-key", "null-typed-file"),
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("zstd") is None:
        pytest.skip("needs the program zstd")
    folder = tmp_path_factory.mktemp("cases")
    shutil.copy(shared_folder("cases") / "data/build.py", folder / "build.py")
    subprocess.run([sys.executable, "build.py"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_case_gives_what_is_right(cases: Path, name: str) -> None:
    expected = json.loads((cases / name / "expect.json").read_text())
    column, want = expected.get("text_column", "text"), expected["want"]
    said = ""
    try:
        source = find(str(cases / name / "in"))
        said = f"{describe(source.ignored)} {source.mixed}"
        first_bad: dict[str, str] | None = {} if expected.get("skip") else None
        items = make_plan(source.layouts(column), text_column=column, item_bytes=10**8)
        texts = read_items(items, first_bad=first_bad)
    except UserError as error:
        wanted = "not UTF-8" if want == {"job": True} else want["sentence"]  # one sentence before any work
        assert wanted in str(error) and "\n" not in str(error)
        return
    if isinstance(want, list):
        assert texts == want
    elif "at_least" in want:
        assert len(texts) >= want["at_least"] and len(texts) + len(first_bad or {}) == 200
    else:
        assert re.search(want["warns"], said)
