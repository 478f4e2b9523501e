"""JSON of others: types, names, nesting and size are what the schema says, or one bounded reason is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.storage.folders import open_folder
from pipeline.storage.json_files import MOST_BYTES, FileName, WrongJsonError, parse_json, read_json, write_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A schema."""

    name: FileName
    place: tuple[int, ...]
    weight: float = 1.0


@given(values)
def test_it_reads_what_the_standard_library_writes(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), Any) == value


def test_a_value_of_the_schema() -> None:
    content = b'{"name": "a/b.bin", "place": [1, 2], "weight": 3, "unknown": []}'
    assert parse_json(content, Point) == Point(name="a/b.bin", place=(1, 2), weight=3.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"name": "../x", "place": []}', "name: .*no name of a file in a folder"),
        (b'{"name": "/x", "place": []}', "name: .*no name of a file in a folder"),
        (b'{"name": "a", "place": ["1"]}', "place.0: .*integer"),
        (b'{"name": "a", "place": [true]}', "place.0: .*integer"),
        (b'{"name": "a", "place": [1.5]}', "place.0: .*integer"),
        (b'{"name": "a"}', "place: .*required"),
        (b"[]", "object"),
        (b"{", "EOF"),
        (b"[" * 10_000, "recursion limit"),
        (b'{"name": "a", "place": [' + b"9" * 5000 + b"]}", "number out of range"),
        (b" " * (MOST_BYTES + 1), "more than 4,194,304 bytes"),
        (b'{"' + b"\x00" * 1000 + b'": 1}', "control character"),
    ],
)
def test_a_wrong_value_has_one_bounded_reason(content: bytes, reason: str) -> None:
    with pytest.raises(WrongJsonError, match=reason) as caught:
        parse_json(content, Point)
    assert len(str(caught.value)) < 250


def test_a_file_that_is_absent_damaged_and_sound(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert read_json(folder, "p.json", Point, mend="write it") is None
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UserError, match=r"/p\.json is damaged \(name: Field required\); write it$"):
        read_json(folder, "p.json", Point, mend="write it")
    write_json(folder, "p.json", {"name": "a", "place": []})
    assert read_json(folder, "p.json", Point, mend="write it") == Point(name="a", place=())


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(1 << 40)  # no block of it is on the disk
    with pytest.raises(UserError, match="it has more than 4,194,304 bytes"):
        read_json(open_folder(tmp_path), "p.json", Point, mend="write it")
