"""One tree is the same source in every place: on a disk, in a bucket, on the hub, and file by file over http."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline.errors import UserError
from pipeline.sources.sources import find
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.file_server import running_files
from tests.support.s3_server import S3
from tests.support.trees import documents, documents_of, random_tree, write_tree

PATTERNS = ("", "/data", "/data/20*", "/*/*", "/**/part-*", "/_tmp", "/_*/*", "/**/*.[pj]*", "/*.txt", "/d*")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    with running_hub({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def outcome(source: str) -> tuple[list[str], list[tuple[str, int]]] | None:
    """Documents, and what is not read: reasons and numbers; None where the source is refused."""
    try:
        found = find(source)
        return documents_of(found), [(entry.reason, entry.files) for entry in found.ignored]
    except UserError:
        return None


def units(tree: dict[str, bytes]) -> set[str]:
    """What is read or counted: files, and hidden folders as one; those of a job too."""
    found = set()
    for name in tree:
        parts = name.split("/")
        ends = [end for end, part in enumerate(parts, 1) if part[0] == "." or (part[0] == "_" and "=" not in part)]
        found.add("tokens" if parts[0] == "tokens" else "/".join(parts[: ends[0]] if ends else parts))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_is_the_same_documents_in_every_place(seed: int, tmp_path: Path, s3: S3, hub: FakeHub) -> None:
    tree = random_tree(random.Random(seed))
    write_tree(tmp_path / "tree", tree)
    for name, content in tree.items():
        s3.put(f"tree/{name}", content)
    hub.push(hub.branch, tree)
    results = {}
    for pattern in PATTERNS:
        on_disk = outcome(f"{tmp_path}/tree{pattern}")
        assert outcome(f"{s3.url}/tree{pattern}") == on_disk, pattern
        assert outcome(f"hf://datasets/{NAME}{pattern}") == on_disk, pattern
        results[pattern] = on_disk
    if (whole := results[""]) is not None:
        source = find(f"{tmp_path}/tree")
        assert len(source.inputs) + sum(files for _, files in whole[1]) == len(units(tree))
        with running_files(tree) as server:
            addresses = [f"{server.url}/{quote(entry.name)}" for entry in source.inputs]
            assert [text for address in addresses for text in documents(address)] == whole[0]


def test_the_trees_have_something_to_say() -> None:
    """Most are read, many have files that are not, and every suffix occurs."""
    trees = [random_tree(random.Random(seed)) for seed in range(200)]
    names = [name.lower() for tree in trees for name in tree]
    for suffix in (
        ".parquet",
        ".arrow",
        ".feather",
        ".csv",
        ".tsv.xz",
        ".jsonl.bz2",
        ".json.zstd",
        ".txt.gz",
        ".ndjson.zst",
    ):
        assert any(name.endswith(suffix) for name in names), suffix
    assert sum("tokens/items/run.json" in tree for tree in trees) > 10


def test_a_folder_of_a_bucket_that_a_console_made_is_no_file(s3: S3, tmp_path: Path) -> None:
    s3.put("t/a.jsonl", b'{"text": "a"}\n')
    s3.put("t/", b"")
    s3.put("t/deep/", b"")
    s3.put("t/deep/b.jsonl", b'{"text": "b"}\n')
    source = find(f"{s3.url}/t")
    assert [entry.name for entry in source.inputs] == ["a.jsonl", "deep/b.jsonl"] and not source.ignored


def test_a_key_with_an_empty_part_is_named(s3: S3) -> None:
    s3.put("t/a.jsonl", b'{"text": "a"}\n')
    s3.put("t//odd.jsonl", b'{"text": "odd"}\n')
    with pytest.raises(UserError, match=r"t//odd\.jsonl.* two slashes .*; rename it, or name a narrower source"):
        find(f"{s3.url}/t")
    s3.put("t/sub/b.jsonl", b'{"text": "b"}\n')
    assert documents(f"{s3.url}/t/sub") == ["b"]


def test_a_login_page_is_no_document() -> None:
    page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    with running_files({"a.txt": page, "b.txt": b"a text of its own", "c.jsonl": page}) as server:
        server.content_type = "text/html; charset=utf-8"
        for name in ("a.txt", "c.jsonl"):
            with pytest.raises(UserError, match=rf"{name}: the server sent a web page \(HTML\), such as a login page"):
                find(f"{server.url}/{name}")
        assert documents(f"{server.url}/b.txt") == ["a text of its own"]
