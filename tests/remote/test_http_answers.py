"""What web servers really answer, each way once: the documents, or one sentence that leads on."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.sources.sources import find
from tests.support.file_server import ALWAYS, FileServer, running_files
from tests.support.texts import json_lines, zstd
from tests.support.trees import documents_of

LINES = json_lines(["a", "b"])
PACKED = gzip.compress(LINES, mtime=0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Answers GET and nothing else, as a signed address does."""
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    with running_files({}) as running:
        yield running


def answer(address: str) -> list[str] | str:
    """The documents, or the sentence with which reading ends."""
    try:
        return documents_of(find(address))
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.jsonl", "a.jsonl"),
        ("bucket/a.jsonl", "bucket/a.jsonl?X-Amz-Signature=abc%2F&x=1"),
        ("resolve/main/a.jsonl", "resolve/main/a.jsonl?download=true"),
        ("my texts/é#.jsonl", "my%20texts/%C3%A9%23.jsonl"),
        ("my texts/é.jsonl", "my texts/é.jsonl"),
        ("a.jsonl", "a.jsonl#part"),
    ],
)
def test_addresses_as_people_give_them(server: FileServer, name: str, path: str) -> None:
    server.files[name] = LINES
    server.required_query = path.partition("?")[2]
    assert answer(f"{server.url}/{path}") == ["a", "b"]
    assert all(headers["accept-encoding"] == "identity" for headers in server.headers_seen)


@pytest.mark.parametrize("path", ["get?file=a.jsonl", "start"])
def test_an_address_without_the_name_of_a_file(server: FileServer, path: str) -> None:
    server.files = {"get": LINES, "start": LINES}
    sentence, name = answer(f"{server.url}/{path}"), path.partition("?")[0]
    assert isinstance(sentence, str) and sentence.startswith(f"source {server.url}/{name} is no .parquet")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("a.jsonl.gz", PACKED, "gzip"),  # Apache's AddEncoding
        ("a.jsonl.gz", PACKED, "x-gzip"),
        ("a.jsonl", LINES, "utf-8"),  # no such encoding, but servers send it
        ("a.jsonl", LINES, "aws-chunked"),
        ("a.jsonl", LINES, "gzip"),  # said, but not done
        ("a.jsonl.zst", zstd(LINES), "zstd"),
    ],
    ids=["gzip", "x-gzip", "utf-8", "aws-chunked", "gzip, not done", "zstd"],
)
def test_what_a_server_says_of_the_encoding_is_not_applied(
    server: FileServer, name: str, content: bytes, encoding: str, ranges: bool
) -> None:
    server.files[name], server.ranges = content, ranges
    server.traffic.fail(headers={"Content-Encoding": encoding}, times=ALWAYS)
    assert answer(f"{server.url}/{name}") == ["a", "b"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_is_stored_packed_under_a_plain_name(server: FileServer, name: str, ranges: bool) -> None:
    """As buckets keep it whose uploader packed it; nobody can rename a file behind an address."""
    server.files[name], server.ranges = PACKED, ranges
    server.traffic.fail(headers={"Content-Encoding": "gzip"}, times=ALWAYS)
    where = f"{server.url}/{name}"
    assert answer(where) == f"{where} is gzip data; download it, add .gz to its name, and name the local file as source"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_empty_file(server: FileServer, name: str, ranges: bool) -> None:
    server.files[name], server.ranges = b"", ranges
    assert answer(f"{server.url}/{name}") == "the source holds no text"


@pytest.mark.parametrize("query", ["", "?x=1"])
def test_an_address_that_leads_to_another(server: FileServer, query: str) -> None:
    server.files = {"start.jsonl": b"", "real/b": LINES}
    there = {"Location": f"{server.url.replace('127.0.0.1', 'localhost')}/real/b?signature=1"}
    server.traffic.fail(path="start.jsonl", status=302, headers=there, times=ALWAYS)
    assert answer(f"{server.url}/start.jsonl{query}") == ["a", "b"]


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Content-Range": "bytes 0-0/*"}, "the server does not say how long the file is"),
        ({"ETag": None}, "has changed since the plan was made"),
    ],
    ids=["no length", "another version each time"],
)
def test_answers_that_cannot_be_trusted(server: FileServer, headers: dict[str, Any], sentence: str) -> None:
    server.files["a.jsonl"] = LINES
    for number in range(50):
        values = {name: value or f'W/"{number}"' for name, value in headers.items()}
        server.traffic.fail(headers=values)
    said = answer(f"{server.url}/a.jsonl")
    assert isinstance(said, str) and said.startswith(f"{server.url}/a.jsonl") and sentence in said


@pytest.mark.parametrize(("user", "expected"), [("", None), ("user:pa%40ss@", "Basic dXNlcjpwYUBzcw==")])
def test_the_name_and_password_in_an_address_are_sent(server: FileServer, user: str, expected: str | None) -> None:
    server.files["a.jsonl"] = LINES
    assert answer(f"{server.url.replace('//', f'//{user}')}/a.jsonl") == ["a", "b"]
    assert server.headers_seen and {headers.get("authorization") for headers in server.headers_seen} == {expected}
