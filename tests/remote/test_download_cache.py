"""The cache: whole, verified files, downloads that go on after a kill, and a folder that never outgrows its bound."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import files as remote_files
from pipeline.remote.download_cache import Cache
from pipeline.remote.remote_file import RemoteFile
from tests.support.file_server import ALWAYS
from tests.support.places import Place, http_place, hub_place, make_place

ROOT = Path(__file__).resolve().parents[2]
LONG = random.Random(4).randbytes(40_000_000)  # for another process, whose ranges are 8 MiB
CONTENT = LONG[:10_000_000]  # five ranges of 2 MiB
OTHER = random.Random(5).randbytes(10_000_000)
LARGE = 100_000_000


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    monkeypatch.setattr(remote_files, "_RANGE_BYTES", 2 << 20)


@pytest.fixture(params=["hub", "http", "s3"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with make_place(request.param, request) as place:
        yield place


@pytest.fixture
def hub() -> Iterator[Place]:
    with hub_place() as place:
        yield place


@pytest.fixture
def http() -> Iterator[Place]:
    with http_place() as place:
        yield place


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", LARGE)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetched(cache: Cache, file: RemoteFile) -> str:
    """sha256 of the file as the cache hands it out."""
    with cache.file(file) as path:
        return sha256(path.read_bytes())


def held(folder: Path) -> dict[str, int]:
    """Files and sizes, but for the lock; the process that is watched may delete them meanwhile."""
    sizes = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    return {name: size for name, size in sizes.items() if name != ".lock"}


def part_bytes(folder: Path) -> int:
    return sum(size for name, size in held(folder).items() if name.endswith(".part"))


def start(
    cache: Cache, files: list[RemoteFile], *, hold_seconds: float = 0, limit_bytes: int = 0
) -> subprocess.Popen[str]:
    """Another process that reads the files."""
    arguments = [str(cache.folder), str(cache.max_bytes), str(hold_seconds), str(limit_bytes)]
    values = json.dumps([dataclasses.asdict(file) for file in files])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.cache_process", *arguments, values],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until_part_has(folder: Path, num_bytes: int, process: subprocess.Popen[str]) -> None:
    while part_bytes(folder) < num_bytes:
        assert process.poll() is None
        time.sleep(0.01)


# ---- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 10_000_000])
def test_the_whole_file_for_as_long_as_it_is_read(place: Place, cache: Cache, size: int) -> None:
    file = place.put("a folder/a.jsonl.gz", CONTENT[:size])
    with cache.file(file) as path:
        assert path.parent == cache.folder
        assert path.name.endswith(".jsonl.gz")
        assert sha256(path.read_bytes()) == sha256(CONTENT[:size])
        assert list(held(cache.folder)) == [path.name]
    assert held(cache.folder) == {}
    with pytest.raises(KeyError), cache.file(file):
        raise KeyError
    assert held(cache.folder) == {}


@pytest.mark.parametrize(
    "fault", [{"status": 503, "times": 4}, {"cut_after": 300_000, "times": 7}, {"status": 429}], ids=str
)
def test_faults_are_healed(place: Place, cache: Cache, fault: dict[str, int]) -> None:
    file = place.put("a.parquet", CONTENT)
    place.fail(**fault)
    assert fetched(cache, file) == sha256(CONTENT)


def test_a_small_hub_file_is_checked_by_its_git_hash(hub: Place, cache: Cache) -> None:
    hub.server.small_paths = {"a.txt"}
    file = hub.put("a.txt", CONTENT[:1000])
    assert file.version.startswith("blob:")
    assert fetched(cache, file) == sha256(CONTENT[:1000])
    hub.fail(content=OTHER[:1000], times=ALWAYS)
    with pytest.raises(DamagedInputError, match="it arrived twice with the checksum"):
        fetched(cache, file)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_wrong_checksum_once_is_healed(hub: Place, cache: Cache, times: int) -> None:
    file = hub.put("a.parquet", CONTENT)
    hub.fail(content=OTHER, times=times)  # of the five ranges of the first round
    assert fetched(cache, file) == sha256(CONTENT)
    assert hub.traffic.asked_bytes() == 2 * len(CONTENT)


def test_a_wrong_checksum_twice_is_a_damaged_input(hub: Place, cache: Cache) -> None:
    file = hub.put("data/a.parquet", CONTENT[:1000])
    hub.fail(content=OTHER[:1000], times=ALWAYS)
    with pytest.raises(DamagedInputError) as raised:
        fetched(cache, file)
    assert str(raised.value) == (
        f"hf://datasets/someone/texts/data/a.parquet is damaged: it arrived twice with the checksum "
        f"{sha256(OTHER[:1000])}, and should have {sha256(CONTENT[:1000])}"
    )
    assert held(cache.folder) == {}
    assert len(hub.traffic.asked) == 2


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_file_that_changed_since_the_listing(kind: str, request: pytest.FixtureRequest, cache: Cache) -> None:
    with make_place(kind, request) as place:
        file = place.put("a.txt", CONTENT[:1000])
        place.put("a.txt", OTHER[:1000])
        with pytest.raises(DamagedInputError, match=r"a\.txt has changed since the plan was made; plan it anew"):
            fetched(cache, file)
        assert held(cache.folder) == {}


def test_no_version_no_resume(http: Place, cache: Cache) -> None:
    http.server.etags = False
    file = http.put("a.txt", CONTENT)
    http.fail(status=404, first_byte=8_000_000)
    with pytest.raises(DamagedInputError):
        fetched(cache, file)
    assert held(cache.folder) == {}
    http.fail(status=403, first_byte=8_000_000)
    with pytest.raises(UserError, match="refuses it"):
        fetched(cache, file)
    assert part_bytes(cache.folder) > 5_000_000
    http.forget()
    assert fetched(cache, file) == sha256(CONTENT)
    assert http.traffic.asked_bytes() == len(CONTENT) + 1  # one byte to look for ranges


# ---- killed processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hub", "http"])
def test_a_killed_download_goes_on_in_another_process(kind: str, request: pytest.FixtureRequest, cache: Cache) -> None:
    with make_place(kind, request) as place:
        file = place.put("a.parquet", LONG)
        place.fail(first_byte=16 << 20, delay_seconds=60, times=ALWAYS)  # two ranges of 8 MiB come, then silence
        process = start(cache, [file])
        wait_until_part_has(cache.folder, 16 << 20, process)
        process.kill()
        process.communicate()
        place.forget()
        there_bytes = part_bytes(cache.folder)
        assert there_bytes == 16 << 20
        assert fetched(cache, file) == sha256(LONG)
        probe_bytes = 1 if kind == "http" else 0  # looks for ranges
        assert place.traffic.asked_bytes() == len(LONG) - there_bytes + probe_bytes
        assert held(cache.folder) == {}


def test_what_was_damaged_on_this_disk_is_fetched_again(hub: Place, cache: Cache) -> None:
    file = hub.put("a.parquet", CONTENT)
    hub.fail(status=403, first_byte=5_000_000)
    with pytest.raises(UserError, match="the hub refuses it"):
        fetched(cache, file)
    (name,) = held(cache.folder)
    with (cache.folder / name).open("r+b") as part:
        part.seek(1000)
        part.write(b"a bad block")
    hub.forget()
    assert fetched(cache, file) == sha256(CONTENT)
    assert len(CONTENT) < hub.traffic.asked_bytes() < 2 * len(CONTENT)


def test_a_file_whose_reader_was_killed_is_not_fetched_again(http: Place, cache: Cache) -> None:
    file = http.put("a.parquet", CONTENT)
    process = start(cache, [file], hold_seconds=100)
    while not any(name.endswith(".parquet") for name in held(cache.folder)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    http.forget()
    assert fetched(cache, file) == sha256(CONTENT)
    assert http.traffic.asked == []
    assert held(cache.folder) == {}


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_a_file_larger_than_the_cache(http: Place, tmp_path: Path) -> None:
    file = http.put("a.parquet", CONTENT[:1001])
    cache = Cache(tmp_path / "cache", 1000)
    with pytest.raises(UserError) as raised:
        fetched(cache, file)
    assert str(raised.value) == (
        f"{file.where} has 1,001 bytes, more than the 1,000 of the cache in {tmp_path}/cache; raise --cache_bytes"
    )
    assert fetched(Cache(tmp_path / "cache", 1001), file) == sha256(CONTENT[:1001])


def test_several_processes_stay_below_the_bound_together(http: Place, tmp_path: Path) -> None:
    sizes = [3_000_000, 1_000_000, 4_000_000, 2_000_000, 500_000, 0, 3_500_000, 2_500_000, 1_500_000]
    files = [http.put(f"{index}.bin", CONTENT[index : index + size]) for index, size in enumerate(sizes)]
    cache = Cache(tmp_path / "cache", 7_000_000)
    http.traffic.bytes_per_second = 2e7
    sums: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            sums.append(sum(held(cache.folder).values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    processes = [start(cache, files[index:] + files[:index], hold_seconds=0.05) for index in (0, 3, 6)]
    outputs = [process.communicate(timeout=1200)[0].splitlines() for process in processes]
    ended.set()
    watcher.join()
    expected = {f"{file.name} {sha256(CONTENT[i : i + sizes[i]])}" for i, file in enumerate(files)}
    assert all(len(lines) == len(files) and set(lines) == expected for lines in outputs)
    assert max(sums) <= 7_000_000
    assert max(sums) > 0
    assert held(cache.folder) == {}


def test_who_finds_no_room_waits_for_it(http: Place, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 7_000_000)
    sizes = {"a.bin": 4_000_000, "b.bin": 3_000_000, "c.bin": 1}
    first, second, third = (http.put(name, CONTENT[:size]) for name, size in sizes.items())
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.append(fetched(cache, third)))
    with cache.file(second):
        with cache.file(first):  # the cache is full to the byte
            assert sum(held(cache.folder).values()) == 7_000_000
            http.forget()
            thread.start()
            thread.join(1)
            assert thread.is_alive() and not http.traffic.asked
        thread.join()
        assert read == [sha256(CONTENT[:1])]
        assert sum(held(cache.folder).values()) == 3_000_000


def test_readers_of_the_same_file_take_turns(http: Place, cache: Cache) -> None:
    file = http.put("a.bin", CONTENT[:3_000_000])
    read: list[str] = []
    threads = [threading.Thread(target=lambda: read.append(fetched(cache, file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [sha256(CONTENT[:3_000_000])] * 4
    assert held(cache.folder) == {}


def test_left_over_parts_go_when_their_room_is_needed_the_oldest_first(http: Place, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 5_000_000)
    names: list[str] = []
    for index, content in enumerate((CONTENT, CONTENT[1:], CONTENT[2:])):  # three versions of one file
        file = http.put("a.bin", content[:4_200_000])
        http.fail(status=403, first_byte=1)  # the second range
        with pytest.raises(UserError, match="refuses it"):
            fetched(Cache(cache.folder, LARGE), file)
        http.forget()
        (name,) = held(cache.folder).keys() - set(names)
        names.append(name)
        with (cache.folder / name).open("r+b") as part:
            part.truncate(1_000_000)
        os.utime(cache.folder / name, (index, index))
    assert held(cache.folder) == dict.fromkeys(names, 1_000_000)
    small = http.put("b.bin", CONTENT[:2_000_000])
    with cache.file(small):
        assert set(names) < held(cache.folder).keys()  # all have room
    with cache.file(http.put("c.bin", CONTENT[:2_200_000])):
        assert held(cache.folder).keys() & set(names) == set(names[1:])
    assert fetched(cache, file) == sha256(CONTENT[2:4_200_002])  # goes on from its part, the other goes
    assert held(cache.folder) == {}


def test_a_disk_without_room(http: Place, cache: Cache) -> None:
    file = http.put("a.bin", CONTENT[:10_000_000])
    process = start(cache, [file], limit_bytes=5_000_000)
    output, _ = process.communicate(timeout=1200)
    assert f"{cache.folder}/" in output
    assert output.endswith(".part cannot be written: File too large\n")
    assert fetched(cache, file) == sha256(CONTENT[:10_000_000])
