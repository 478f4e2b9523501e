"""The hub: which files a source names, at which commit, under which token, and each refusal against its sentence."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing import globs
from pipeline.remote import files as remote_files
from pipeline.remote import hub_datasets
from pipeline.remote.remote_file import RemoteFile
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.file_server import running_files

SECRET = "hf_a_secret_that_nobody_may_see"
COMMIT = "a" * 40
LARGE = random.Random(1).randbytes(20_000_000)
FILES = {
    "README.md": b"# no data",
    "data/b.parquet": b"content of b",
    "data/a 1#%.parquet": b"content of a",
    "data/deep/c.jsonl": LARGE,
    "more/c.jsonl": b"",
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("GPT25_FIRST_WAIT_SECONDS", "0.01")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with running_hub(FILES) as server:
        server.small_paths = {"data/b.parquet"}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def names(source: str) -> list[str]:
    return [file.name for file in remote_files.list_files(source)[1]]


def mistake(source: str, kind: type[UserError] = UserError) -> str:
    """The sentence that listing or reading ends with; never the token."""
    with pytest.raises(kind) as raised:
        for file in remote_files.list_files(source)[1]:
            remote_files.read_ranges(file, [(0, file.size_bytes)])
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


# ---- which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["README.md", "data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl", "more/c.jsonl"]),
        ("/", ["README.md", "data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl", "more/c.jsonl"]),
        ("/data", ["data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl"]),
        ("/data/", ["data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl"]),
        ("/data/*.parquet", ["data/a 1#%.parquet", "data/b.parquet"]),
        ("/*.parquet", []),
        ("/**/*.jsonl", ["data/deep/c.jsonl", "more/c.jsonl"]),
        ("/data/**", ["data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl"]),
        ("/*/c.jsonl", ["more/c.jsonl"]),
        ("/data/d*", ["data/deep/c.jsonl"]),
        ("/data/[!a].parquet", ["data/b.parquet"]),
        ("/data/b.parquet", ["data/b.parquet"]),
        ("/dat", []),
        ("/absent/*.parquet", []),
    ],
)
def test_names_and_globs(fake: FakeHub, pattern: str, expected: list[str]) -> None:
    assert names(f"hf://datasets/{NAME}{pattern}") == expected


@pytest.mark.parametrize("pattern", ["*", "**/*.b", "a/*", "a/**/c.b", "a/?.b", "*/d/*", "**/d/**/*.b", "a/[bc].b"])
def test_globs_are_those_of_the_file_system(tmp_path: Path, pattern: str) -> None:
    paths = ["c.b", "x", "a/b.b", "a/c.b", "a/c.c", "a/d/c.b", "a/d/e/c.b", "d/x.b", "a/d/e/f"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    matched = {path for path in tmp_path.glob(pattern) if path != tmp_path}
    expected = {name for name in paths if not matched.isdisjoint({tmp_path / name, *(tmp_path / name).parents})}
    assert {name for name in paths if globs.matches(name, pattern)} == expected


def test_files_are_pinned_to_a_commit(fake: FakeHub) -> None:
    pinned, files = remote_files.list_files(f"hf://datasets/{NAME}@refs%2Fconvert%2Fparquet/data")
    assert pinned == f"hf://datasets/{NAME}@{COMMIT}/data"
    assert remote_files.list_files(f"hf://datasets/{NAME}/")[0] == f"hf://datasets/{NAME}@{COMMIT}"
    blob = hashlib.sha1(b"blob 12\0content of b").hexdigest()
    assert files[1] == RemoteFile(
        url=f"hf://datasets/{NAME}@{COMMIT}/data/b.parquet",
        name="data/b.parquet",
        size_bytes=12,
        version=f"blob:{blob}",
    )
    assert files[2].version == f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    assert files[1].where == f"hf://datasets/{NAME}/data/b.parquet"
    fake.push("b" * 40, {"data/b.parquet": b"moved on"})
    contents = [remote_files.read_ranges(file, [(0, file.size_bytes)])[0] for file in files]
    is_same = contents == [
        b"content of a",
        b"content of b",
        LARGE,
    ]
    assert is_same  # not spelled out: 20 MB
    assert names(str(pinned)) == [file.name for file in files]
    assert names(f"hf://datasets/{NAME}/data") == ["data/b.parquet"]


@pytest.mark.parametrize(
    ("place", "commit", "expected"),
    [
        ("@refs/convert/parquet/data/b*", COMMIT, ["data/b.parquet"]),
        ("@~parquet/data/b*", COMMIT, ["data/b.parquet"]),
        (
            "@~parquet",
            COMMIT,
            ["README.md", "data/a 1#%.parquet", "data/b.parquet", "data/deep/c.jsonl", "more/c.jsonl"],
        ),
        ("@refs%2Fconvert%2Fparquet/data/b*", COMMIT, ["data/b.parquet"]),
        ("@feature/x", "b" * 40, ["x/data/y.jsonl", "x/z.jsonl"]),
        ("@feature/x/x/data", "b" * 40, ["x/data/y.jsonl"]),
        ("@feature%2Fx/x/*.jsonl", "b" * 40, ["x/z.jsonl"]),
        ("@feature/x/y", "c" * 40, ["deep.jsonl"]),
        ("@feature/x/y/*.jsonl", "c" * 40, ["deep.jsonl"]),
        (f"@{COMMIT}/more", COMMIT, ["more/c.jsonl"]),
    ],
)
def test_revisions_with_slashes(fake: FakeHub, place: str, commit: str, expected: list[str]) -> None:
    fake.commits |= {"b" * 40: {"x/data/y.jsonl": b"y", "x/z.jsonl": b"z"}, "c" * 40: {"deep.jsonl": b"d"}}
    fake.branches = {"feature/x": "b" * 40, "feature/x/y": "c" * 40, "other/branch": COMMIT}
    pinned, files = remote_files.list_files(f"hf://datasets/{NAME}{place}")
    assert str(pinned).startswith(f"hf://datasets/{NAME}@{commit}")
    assert [file.name for file in files] == expected
    assert names(str(pinned)) == expected


def test_only_the_folder_that_is_named_is_listed(fake: FakeHub) -> None:
    names(f"hf://datasets/{NAME}/data/deep/*.jsonl")
    assert f"GET /api/datasets/{NAME}/tree/{COMMIT}/data/deep" in fake.requests


# ---- the token -------------------------------------------------------------------------------------------------------


def test_the_token_comes_from_the_environment_and_goes_to_the_hub_only(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_files({"data/deep/c.jsonl": LARGE}) as store:
        fake.store = store
        store.required_query = "Signature=first"
        _, (file,) = remote_files.list_files(f"hf://datasets/{NAME}/data/deep")
        assert SECRET not in repr(file)
        reader = remote_files.open_file(file)
        assert reader.read(5) == LARGE[:5]
        assert fake.tokens == {f"Bearer {SECRET}"}
        asked = len(fake.requests)
        reader.seek(10_000_000)
        assert reader.read(5) == LARGE[10_000_000:10_000_005]
        assert len(fake.requests) == asked  # the signed address is remembered
        store.required_query = "Signature=second"
        reader.seek(15_000_000)
        assert reader.read(5) == LARGE[15_000_000:15_000_005]  # its time is over: the hub is asked for a new one
        assert len(fake.requests) == asked + 1
        reader.close()
        assert all("authorization" not in headers for headers in store.headers_seen)
        fake.store.files.clear()
        assert "data/deep/c.jsonl: the hub" in mistake(f"hf://datasets/{NAME}/data/deep")
    monkeypatch.delenv("HF_TOKEN")
    fake.tokens.clear()
    assert names(f"hf://datasets/{NAME}")
    assert fake.tokens == {None}


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_listing_asks_again(fake: FakeHub) -> None:
    fake.listing_faults = [(503, {}), (429, {"Retry-After": "0"}), (200, {}), (500, {}), (504, {})]
    fake.listing_faults.remove((200, {}))
    assert names(f"hf://datasets/{NAME}/data/b.parquet") == ["data/b.parquet"]
    assert not fake.listing_faults


def test_mistakes(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"hf://datasets/{NAME}"
    assert "the hub has no such data set, or it is private" in mistake("hf://datasets/someone/absent")
    assert "the hub has no such revision" in mistake(f"{source}@v9")
    assert "the hub has no such revision" in mistake(f"{source}@v9/data/*.parquet")
    assert "is not of the form hf://datasets/OWNER/NAME" in mistake("hf://datasets/only-a-name")
    fake.listing_faults = [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})]
    assert mistake(source) == f"{source}: the hub refuses it (401); is HF_TOKEN right, and may it read this data set?"
    fake.gated = True
    assert mistake(source) == f"{source}: access is gated; accept its terms on the hub and set HF_TOKEN"
    fake.gated, fake.failing = False, True
    assert mistake(source) == f"{source}: the hub answered with an error (503); try again later"
    assert fake.requests.count(f"GET /api/datasets/{NAME}/revision/main") >= 5
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert mistake(source) == (
        f"{source}: the hub at http://127.0.0.1:9 cannot be reached; check the network and HF_ENDPOINT, "
        "then run the same command again"
    )


def test_a_file_that_vanished_or_is_refused(fake: FakeHub) -> None:
    _, (file,) = remote_files.list_files(f"hf://datasets/{NAME}/data/b.parquet")
    fake.traffic.fail(status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(UserError, match=r"b\.parquet: access is gated; accept its terms on the hub"):
        remote_files.read_ranges(file, [(0, 5)])
    fake.traffic.fail(status=403)
    with pytest.raises(UserError, match=r"b\.parquet: the hub refuses it \(403\); is HF_TOKEN right"):
        remote_files.read_ranges(file, [(0, 5)])
    fake.push(COMMIT, {})
    with pytest.raises(DamagedInputError, match=r"someone/texts/data/b\.parquet: the hub has no such file"):
        remote_files.read_ranges(file, [(0, 5)])


def test_addresses_are_quoted(fake: FakeHub) -> None:
    location, _ = hub_datasets.address(f"hf://datasets/{NAME}@{COMMIT}/data/a 1#%.parquet")
    assert location == f"{fake.url}/datasets/{NAME}/resolve/{COMMIT}/data/a%201%23%25.parquet"
