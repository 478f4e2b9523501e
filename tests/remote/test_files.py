"""Remote bytes against the bytes that were put there, through every fault: nothing lost, nothing doubled."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import gzip
import io
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import files as remote_files
from pipeline.remote import http as remote_http
from pipeline.remote import retry
from pipeline.remote.range_reader import RangeFile
from pipeline.remote.remote_file import RemoteFile
from tests.support.file_server import ALWAYS
from tests.support.places import Place, http_place, make_place
from tests.support.s3_server import S3

CONTENT = random.Random(3).randbytes(5_000_000)  # three ranges
RANGE_BYTES = 2 << 20


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    monkeypatch.setattr(remote_files, "_RANGE_BYTES", RANGE_BYTES)


@pytest.fixture(params=["hub", "http", "s3"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with make_place(request.param, request) as place:
        yield place


@pytest.fixture
def http() -> Iterator[Place]:
    with http_place() as place:
        yield place


def is_whole(file: RemoteFile, content: bytes = CONTENT) -> bool:
    """Whether all of the file arrives, once."""
    return b"".join(remote_files.stream(file)) == content


def mistake(file: RemoteFile, kind: type[UserError]) -> str:
    """The one sentence that all ways to read the file end with."""
    messages = set()
    for read in (
        lambda: list(remote_files.stream(file)),
        lambda: remote_files.read_ranges(file, [(0, 10), (file.size_bytes - 10, file.size_bytes)]),
        lambda: remote_files.open_file(file).read(10),
    ):
        with pytest.raises(kind) as raised:
            read()
        messages.add(str(raised.value))
    (message,) = messages
    assert "\n" not in message
    return message


# ---- without faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 70_000, RANGE_BYTES, RANGE_BYTES + 1, 5_000_000])
def test_all_ways_to_read_give_the_same_bytes(place: Place, size: int) -> None:
    content = CONTENT[:size]
    file = place.put("a folder/a.bin", content)
    assert file.size_bytes == size
    assert b"".join(remote_files.stream(file)) == content
    assert b"".join(remote_files.stream(file, size // 3)) == content[size // 3 :]
    choose = random.Random(size)
    cuts = [sorted(choose.choices(range(size + 1), k=2)) for _ in range(12)]
    ranges = [(start, stop) for start, stop in [*cuts, (0, size), (0, 0), (size, size), (size // 2, size)]]
    is_same = remote_files.read_ranges(file, ranges) == [content[start:stop] for start, stop in ranges]
    assert is_same
    with remote_files.open_file(file) as reader:
        is_same = reader.read() == content and reader.read(5) == b""
        assert is_same


def test_parquet_and_compressed_lines_are_read_where_they_lie(place: Place, tmp_path: Path) -> None:
    table = pa.table({"id": range(3000), "text": [f"{i} text" * 50 for i in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    file = place.put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    with remote_files.open_file(file) as reader, pq.ParquetFile(reader) as parquet:
        assert parquet.metadata.num_row_groups == 30
        assert parquet.read_row_groups([7, 8], ["text"]).equals(table.slice(700, 200).select(["text"]))
    lines = b"".join(b"%d line\n" % i for i in range(200_000))
    file = place.put("a.jsonl.gz", gzip.compress(lines, 1))
    with remote_files.open_file(file) as reader, pa.input_stream(reader, compression="gzip") as unpacked:
        assert unpacked.read() == lines


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(0, 300))
def test_a_range_file_reads_as_bytes_in_memory_do(data: st.DataObject, size: int) -> None:
    content = CONTENT[:size]

    def stream(start: int) -> Any:
        yield from (content[first : first + 7] for first in range(start, size, 7))

    file = RangeFile(size, lambda start, stop: content[start : max(start + 1, stop - 3)], stream)
    twin = io.BytesIO(content)
    for _ in range(data.draw(st.integers(0, 20))):
        if data.draw(st.booleans()):
            place = data.draw(st.integers(-size, size))
            whence = data.draw(st.sampled_from([0, 1, 2]))
            if (0, twin.tell(), size)[whence] + place >= 0:
                assert file.seek(place, whence) == twin.seek(place, whence)
        count = data.draw(st.integers(-1, 80))
        if data.draw(st.booleans()):
            assert file.read(count) == twin.read(count)
        else:
            buffers = bytearray(max(0, count)), bytearray(max(0, count))
            assert file.readinto(buffers[0]) == twin.readinto(buffers[1])
            assert buffers[0] == buffers[1]
        assert file.tell() == twin.tell()


def test_reading_in_order_opens_one_stream(http: Place) -> None:
    file = http.put("a.bin", CONTENT)
    with remote_files.open_file(file) as reader:
        for start in range(0, len(CONTENT), 50_000):
            assert reader.read(50_000) == CONTENT[start : start + 50_000]
    assert len(http.traffic.asked) <= 7
    assert http.traffic.asked_bytes() <= len(CONTENT) + 1  # and one byte to see whether the server knows ranges
    http.forget()
    with remote_files.open_file(file) as reader:
        for start in (3_500_000, 1_000_000, 2_500_000):
            reader.seek(start)
            assert reader.read(3) == CONTENT[start : start + 3]
    assert http.traffic.asked_bytes() < 200_000


def test_forty_ranges_are_fetched_side_by_side(place: Place) -> None:
    file = place.put("a.bin", CONTENT)
    ranges = [(start, start + 20_000) for start in range(0, 5_000_000, 125_000)]
    assert len(ranges) == 40
    if place.kind != "s3":
        place.traffic.together = threading.Barrier(8)  # never answered one after the other
    assert remote_files.read_ranges(file, ranges) == [CONTENT[start:stop] for start, stop in ranges]
    if place.kind != "s3":
        assert place.traffic.asked_bytes() <= 800_001


def test_ranges_that_touch_are_fetched_as_one(http: Place) -> None:
    file = http.put("a.bin", CONTENT)
    ranges = [(start, start + 1000) for start in range(0, 1_000_000, 1000)]
    random.Random(1).shuffle(ranges)
    assert remote_files.read_ranges(file, ranges) == [CONTENT[start:stop] for start, stop in ranges]
    assert len(http.traffic.asked) == 2


# ---- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 503, "times": 6},
        {"status": 500, "times": 2},
        {"status": 429, "headers": {"Retry-After": "0"}, "times": 5},
        {"cut_after": 1},
        {"cut_after": 300_000},
        {"cut_after": 400_000, "times": 12},
        {"cut_after": RANGE_BYTES - 1, "times": 2},
    ],
    ids=str,
)
def test_what_passes_is_healed(place: Place, fault: dict[str, Any]) -> None:
    file = place.put("a.bin", CONTENT)
    place.fail(**fault)
    assert is_whole(file)
    place.forget()
    place.fail(**fault)
    ranges = [(0, 5), (100_000, 3_000_000), (4_000_000, 5_000_000)]
    is_same = remote_files.read_ranges(file, ranges) == [CONTENT[start:stop] for start, stop in ranges]
    assert is_same


def test_many_faults_at_once(place: Place) -> None:
    file = place.put("a.bin", CONTENT)
    choose = random.Random(5)
    for _ in range(10 if place.kind == "s3" else 40):  # obstore's own waits are longer
        trouble: dict[str, Any] = {"cut_after": choose.randrange(1, 1_000_000)}
        if choose.random() < 0.3:
            trouble = {"status": choose.choice([429, 500, 502, 503, 504])}
        place.fail(**trouble)
    assert is_whole(file)


def test_what_arrived_is_not_asked_for_again(http: Place) -> None:
    file = http.put("a.bin", CONTENT)
    for size in (800_000, 300_000, 300_000):
        http.fail(cut_after=size, after=1)
    assert is_whole(file)
    starts = sorted(start for _, start, _ in http.traffic.asked)
    assert len(set(starts)) == 6  # each of the broken ones goes on from where it was
    assert http.traffic.sent_bytes <= len(CONTENT) + 1


def test_a_server_that_falls_silent(http: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_http, "_SILENCE_SECONDS", 1.0)  # long enough for the answers that are not delayed
    file = http.put("a.bin", CONTENT)
    http.fail(delay_seconds=3.0, times=2)
    assert is_whole(file)
    assert len(http.traffic.asked) >= 6


def test_retry_after_is_honoured(http: Place) -> None:
    file = http.put("a.bin", CONTENT[:100])
    http.fail(status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert is_whole(file, CONTENT[:100])
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=10;t=55'}, None),
    ],
)
def test_wait_that_a_server_asks_for(headers: dict[str, str], expected: float | None) -> None:
    assert retry.retry_after_seconds(headers) == expected


def test_wait_until_a_date() -> None:
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    asked = retry.retry_after_seconds({"Retry-After": email.utils.format_datetime(date, usegmt=True)})
    assert asked is not None and 90 < asked <= 100


def test_waits_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPT25_FIRST_WAIT_SECONDS")
    state = retry.RetryState("a.bin")
    waits: list[float] = []
    monkeypatch.setattr(state._stopped, "wait", waits.append)
    for _ in range(retry.TRANSFER_TRIES - 1):
        state.wait(retry.Interrupted("no answer", advice="look after it"))
    assert all(0.25 * 2**i <= seconds <= 0.5 * 2**i for i, seconds in enumerate(waits[:7]))
    assert max(waits) <= 60
    with pytest.raises(UserError, match=r"^a\.bin: no answer; look after it$"):
        state.wait(retry.Interrupted("no answer", advice="look after it"))
    state.progress()
    state.wait(retry.Interrupted("no answer"))
    assert 0.25 <= waits[-1] <= 0.5


def test_one_refusal_ends_the_waits_of_the_others(http: Place) -> None:
    file = http.put("a.bin", CONTENT)
    http.fail(status=429, headers={"Retry-After": "800"}, after=1)
    http.fail(status=404, after=1)
    with pytest.raises(DamagedInputError, match="is missing"):
        remote_files.read_ranges(file, [(0, 10), (3_000_000, 3_000_010)])


# ---- faults that do not ----------------------------------------------------------------------------------------------


def test_a_server_that_never_answers_well(http: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.0001")
    file = http.put("a.bin", CONTENT)
    http.fail(status=503, times=ALWAYS)
    assert mistake(file, UserError) == f"{file.url}: the server answered with an error (503); try again later"
    http.forget()
    http.fail(cut_after=0, times=ALWAYS, after=1)
    message = f"{file.url}: the server at {http.server.url} cannot be reached, or breaks off (RemoteProtocolError); "
    with pytest.raises(UserError) as raised:
        list(remote_files.stream(file))
    assert str(raised.value) == message + "check the network, then run the same command again"
    assert not isinstance(raised.value, DamagedInputError)
    http.server.server_close()


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_file_that_changed_since_the_listing(kind: str, request: pytest.FixtureRequest) -> None:
    with make_place(kind, request) as place:
        old = place.put("a.bin", CONTENT[:2_000_000])
        new = place.put("a.bin", CONTENT[2_000_000:4_000_000])
        assert mistake(old, DamagedInputError) == f"{old.where} has {remote_http.CHANGED}"
        assert is_whole(new, CONTENT[2_000_000:4_000_000])
        place.put("a.bin", CONTENT[:1_000_000])
        assert "changed since the plan was made" in mistake(new, DamagedInputError)


def test_a_file_that_vanished(place: Place) -> None:
    there = place.put("a.bin", CONTENT[:100])
    file = dataclasses.replace(there, url=there.url.replace("a.bin", "b.bin"))
    message = mistake(file, DamagedInputError)
    assert "b.bin" in message
    assert "missing" in message or "the hub has no such file" in message


def test_another_length_than_announced(place: Place) -> None:
    file = place.put("a.bin", CONTENT[:1000])
    for size_bytes in (999, 1001):
        other = dataclasses.replace(file, size_bytes=size_bytes)
        assert "changed since the plan was made" in mistake(other, DamagedInputError)
    with pytest.raises(DamagedInputError, match=r"a\.bin has 1,000 bytes; bytes 990-1001 are not in it"):
        remote_files.read_ranges(file, [(0, 10), (990, 1001)])


def test_a_server_that_sends_another_part(http: Place) -> None:
    file = http.put("a.bin", CONTENT)
    headers = {"Content-Range": f"bytes 5-{RANGE_BYTES + 4}/{len(CONTENT)}"}
    http.fail(headers=headers, content=CONTENT[5:] + CONTENT[:5], after=1)
    assert is_whole(file)


# ---- http servers of all kinds ---------------------------------------------------------------------------------------


def test_a_server_without_ranges_is_read_from_the_start_in_one_go(http: Place) -> None:
    http.server.ranges = False
    file = http.put("a.bin", CONTENT)
    assert is_whole(file)
    assert len(http.traffic.asked) == 2  # one looks for ranges
    http.forget()
    assert remote_files.read_ranges(file, [(2_000_000, 2_000_010), (0, 3)]) == [
        CONTENT[2_000_000:2_000_010],
        CONTENT[:3],
    ]
    assert len(http.traffic.asked) == 2
    http.fail(cut_after=1_000_000, after=1)
    http.fail(cut_after=3_000_000, after=1)
    assert is_whole(file)
    with remote_files.open_file(file) as reader:
        reader.seek(3_500_000)
        assert reader.read(10) == CONTENT[3_500_000:3_500_010]


def test_a_server_that_tells_no_length(http: Place) -> None:
    http.server.lengths = False
    with pytest.raises(UserError, match=r"a\.bin: the server does not say how long the file is \(no Content-Length\)"):
        http.put("a.bin", CONTENT[:100])


def test_without_etags_the_date_and_the_size_tell_a_change(http: Place) -> None:
    http.server.etags = False
    file = http.put("a.bin", CONTENT[:100])
    assert file.version == ""
    http.files["a.bin"] = CONTENT[:99]
    assert "changed since" in mistake(file, DamagedInputError)
    assert remote_http.version_of({"Last-Modified": "yesterday"}) == "modified:yesterday"
    dated = dataclasses.replace(file, size_bytes=99, version="modified:yesterday")
    http.fail(headers={"Last-Modified": "today"}, times=ALWAYS)
    assert "changed since" in mistake(dated, DamagedInputError)


def test_listing_an_address(http: Place) -> None:
    http.server.required_query = "key=hidden"
    http.files["deep/a b.jsonl"] = b"{}\n"
    http.server.files = http.files
    address = http.server.url.replace("//", "//user:password@") + "/deep/a%20b.jsonl"
    pinned, (file,) = remote_files.list_files(f"{address}?key=hidden")
    assert pinned is None
    assert (file.name, file.size_bytes) == ("a b.jsonl", 3)
    assert file.version.startswith('etag:"')
    assert file.where == f"{http.server.url}/deep/a%20b.jsonl"
    assert remote_files.read_ranges(file, [(0, 3)]) == [b"{}\n"]
    http.server.required_query = "key=other"
    with pytest.raises(UserError) as raised:
        remote_files.read_ranges(file, [(0, 3)])
    assert str(raised.value) == (
        f"{file.where}: the server refuses it (403); it needs a login, or the address has expired"
    )
    with pytest.raises(UserError, match="names no file; only single files can be read over http"):
        remote_files.list_files(f"{http.server.url}/folder/")
    with pytest.raises(UserError, match=r"breaks off \(ConnectError\); check the network") as raised:
        remote_files.list_files("http://user:password@127.0.0.1:9/a.txt?key=hidden")
    assert "password" not in str(raised.value) and "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://datasets/a/b", True),
        ("s3://bucket/a", True),
        ("gs://bucket", True),
        ("https://host/a.parquet", True),
        ("http://host/a.parquet", True),
        ("installed-docs", False),
        ("a/b.parquet", False),
        ("hf", False),
        ("ftp://host/a", False),
    ],
)
def test_is_remote(source: str, expected: bool) -> None:
    assert remote_files.is_remote(source) is expected


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.txt", "data/b.parquet", "data/c d.jsonl", "data/deep/e.txt", "database/f.txt"]),
        ("/data", ["b.parquet", "c d.jsonl", "deep/e.txt"]),
        ("/data/", ["b.parquet", "c d.jsonl", "deep/e.txt"]),
        ("/data/*", ["b.parquet", "c d.jsonl", "deep/e.txt"]),
        ("/data/*.jsonl", ["c d.jsonl"]),
        ("/data/**/*.txt", ["deep/e.txt"]),
        ("/data*/*.txt", ["database/f.txt"]),
        ("/data/b.parquet", ["b.parquet"]),
        ("/absent", []),
    ],
)
def test_bucket_names_and_globs(s3: S3, pattern: str, expected: list[str]) -> None:
    for key in ("a.txt", "data/b.parquet", "data/c d.jsonl", "data/deep/e.txt", "database/f.txt"):
        s3.put(key, key.encode())
    pinned, files = remote_files.list_files(f"{s3.url}{pattern}")
    assert pinned is None
    assert [file.name for file in files] == expected
    for file in files:
        key = file.url.removeprefix(f"{s3.url}/")
        assert remote_files.read_ranges(file, [(0, file.size_bytes)]) == [key.encode()]
        assert file.version.startswith("etag:")
