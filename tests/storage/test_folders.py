"""Folders on a disk and in buckets: the same behaviour, nothing half written, and failures said in one sentence.

The buckets are moto's, over HTTP, behind a proxy that answers 503 or cuts connections; boto3 looks past it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.storage import folders, object_store
from pipeline.storage.folders import Folder, LocalFolder, bucket_store, is_url, node_cache, open_folder
from tests.support.s3_server import S3, Fault, FaultyProxy, environment

ROOT = Path(__file__).resolve().parents[2]
PART = folders._PART_BYTES


@pytest.fixture
def gs(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """gs://BUCKET/folder: moto's server understands the requests of Google's XML interface too."""
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "testing")
    monkeypatch.setenv("GOOGLE_BASE_URL", s3.proxy.url)
    return f"gs://{s3.bucket}/folder"


@pytest.fixture(params=["local", "s3", "gs", "bucket root"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder of each kind."""
    if request.param == "local":
        return open_folder(tmp_path / "folder")
    if request.param == "gs":
        return open_folder(request.getfixturevalue("gs"))
    s3 = request.getfixturevalue("s3")
    return open_folder(s3.url + ("/some/folder" if request.param == "s3" else ""))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests are retried for a second, so that what is wrong for good is known sooner."""
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(object_store, "FIRST_RETRY_SECONDS", 0.5)
    object_store._open_store.cache_clear()
    yield
    object_store._open_store.cache_clear()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def mistake(action: Callable[[], object]) -> str:
    """The one sentence that an action ends with."""
    with pytest.raises(UserError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- the same behaviour everywhere -----------------------------------------------------------------------------------


def test_files_come_back(folder: Folder) -> None:
    folder.make()
    assert folder.names() == []
    content = np.arange(1000, dtype=np.uint16)
    parts: list[bytes | memoryview] = [b"head", memoryview(b""), content.data.cast("B")]
    whole = b"head" + content.tobytes()
    assert folder.write("train_000000.bin", parts) == sha256(whole)
    assert folder.write("items/000001.json", iter([b"{", b"}"])) == sha256(b"{}")
    assert folder.write("items/deeper/empty", []) == sha256(b"")
    assert folder.read("train_000000.bin") == whole
    assert folder.read("items/deeper/empty") == b""
    assert folder.size("train_000000.bin") == 2004
    assert folder.names() == ["items/000001.json", "items/deeper/empty", "train_000000.bin"]
    assert folder.write("items/000001.json", [b"[]"]) == sha256(b"[]")
    assert folder.read("items/000001.json") == b"[]"


def test_ranges(folder: Folder) -> None:
    folder.make()
    folder.write("digits", [b"0123456789"])
    for start, stop in [(0, 10), (3, 7), (9, 10), (8, 20), (4, 4), (0, 0), (10, 20), (50, 60)]:
        assert folder.read_range("digits", start, stop) == b"0123456789"[start:stop]
    with pytest.raises(FileNotFoundError):
        folder.read_range("absent", 0, 5)
    with pytest.raises(FileNotFoundError):
        folder.read_range("absent", 0, 0)


def test_absent_files(folder: Folder) -> None:
    folder.make()
    folder.write("items/a", [b"1"])
    for name in ("absent", "items", "items/b", "items/a/c"):
        with pytest.raises(FileNotFoundError) as raised:
            folder.read(name)
        assert raised.value.filename == f"{folder}/{name}"
        assert folder.size(name) is None
    for name in ("absent", "items/b", "items/a/c"):
        folder.delete(name)
    folder.delete("items/a")
    assert folder.names() == []


def test_names_by_prefix(folder: Folder) -> None:
    folder.make()
    names = ["a", "ab/c", "ab/d/e", "b", "items/1", "items/10", "items/2", "itemsx", "train_1", "train_2"]
    for name in reversed(names):
        folder.write(name, [b"1"])
    for prefix in ("", "a", "ab", "ab/", "ab/d", "items/", "items/1", "items", "train_", "train_2", "none", "none/x"):
        assert folder.names(prefix) == [name for name in names if name.startswith(prefix)]


def test_folders_travel_to_other_processes(folder: Folder) -> None:
    folder.make()
    folder.write("a", [b"1"])
    other = pickle.loads(pickle.dumps(folder))
    assert (other, hash(other), str(other)) == (folder, hash(folder), folder.url)
    assert len(pickle.dumps(folder)) < 300
    assert other.read("a") == b"1"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/."])
def test_names_stay_within_the_folder(folder: Folder, name: str) -> None:
    for action in (lambda: folder.read(name), lambda: folder.write(name, [b"1"]), lambda: folder.delete(name)):
        assert "is no name of a file in a folder" in mistake(action)


def test_unusual_names(folder: Folder) -> None:
    folder.make()
    for name in ("with space", "ü/żółw 日本", "100%", "a%20b", "q?x=1#y", "a+b&c=d", "~tilde*"):
        folder.write(name, [name.encode()])
        assert folder.read(name) == name.encode()
        assert folder.names() == [name]
        folder.delete(name)


def test_a_write_that_fails_half_way_leaves_what_was_there(folder: Folder) -> None:
    folder.make()
    folder.write("old", [b"old"])

    def parts(count: int, error: BaseException) -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(PART // 2)
        raise error

    for error in (KeyboardInterrupt(), ValueError("no input"), UserError("damaged")):
        for count in (1, 5):
            with pytest.raises(type(error)) as raised:
                folder.write("old", parts(count, error))
            assert str(raised.value) == str(error)
    assert folder.names() == ["old"]
    assert folder.read("old") == b"old"


def test_large_files_go_in_parts(s3: S3) -> None:
    folder = open_folder(s3.url)
    content = np.random.default_rng(1).integers(0, 256, 2 * PART + 12345, dtype=np.uint8).tobytes()
    pieces = [content[:10], content[10 : PART + 5], content[PART + 5 :]]
    assert folder.write("large", pieces) == sha256(content)
    assert s3.get("large") == content
    assert sum("partNumber" in request for request in s3.requests) == 3
    assert folder.write("exact", [content[:PART]]) == sha256(content[:PART])
    assert s3.get("exact") == content[:PART]
    assert s3.unfinished_uploads() == []


def test_files_that_need_not_outlive_a_power_failure(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.make()
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    folder.write("note", [b"1"], flush="nothing")
    assert synced == []
    folder.write("note", [b"3"], flush="content")
    assert len(synced) == (1 if isinstance(folder, LocalFolder) else 0)
    synced.clear()
    folder.write("note", [b"2"])
    assert len(synced) == (2 if isinstance(folder, LocalFolder) else 0)  # the file and its folder
    assert folder.read("note") == b"2"


def test_temporary_names_are_hidden_and_removed(folder: Folder) -> None:
    folder.make()
    for name in (".tmp-note", "items/.tmp-note", "items/a"):
        folder.write(name, [b"1"])
    assert folder.names() == folder.names("items/") == ["items/a"]
    assert folder.read(".tmp-note") == b"1"
    folder.remove_leftovers()
    assert folder.size(".tmp-note") is None and folder.size("items/.tmp-note") is None
    assert folder.names() == ["items/a"]


# ---- a disk ----------------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "from pipeline.storage.folders import open_folder\n"
        "def parts():\n"
        "    yield b'half'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_folder(sys.argv[1]).write('items/a', parts())\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = open_folder(tmp_path)
    assert [path.name[:6] for path in tmp_path.rglob("*") if path.is_file()] == [".tmp-a"]
    assert folder.names() == []
    folder.remove_leftovers()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = open_folder(tmp_path)
    monkeypatch.setattr(f"os.{failing}", fail)
    assert f"the disk of {tmp_path} is full: a.bin could not be written" in mistake(
        lambda: folder.write("a.bin", [b"1"])
    )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert (
        f"output folder {tmp_path}/file cannot be made: there is a file of that name; choose another --output"
        in mistake(open_folder(tmp_path / "file").make)
    )
    below = open_folder(tmp_path / "file" / "below")
    assert "cannot be made: Not a directory" in mistake(below.make)
    assert "cannot be written: Not a directory" in mistake(lambda: below.write("a", [b"1"]))
    assert below.size("a") is None and below.names() == []
    below.delete("a")
    folder = open_folder(tmp_path / "folder")
    folder.make()
    folder.write("sub/a", [b"1"])
    assert "cannot be deleted: Is a directory" in mistake(lambda: folder.delete("sub"))
    assert "cannot be written" in mistake(lambda: folder.write("sub", [b"1"]))
    assert folder.names() == ["sub/a"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert mistake(folder.make) == f"output folder {folder} cannot be written: Permission denied"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_folder("data/out") == LocalFolder(url=f"{tmp_path}/data/out") == open_folder(tmp_path / "data" / "out")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_folder("~/out").url == f"{tmp_path}/home/out"
    monkeypatch.delenv("GPT25_CACHE", raising=False)
    assert str(node_cache("x")) == f"{tmp_path}/home/.cache/gpt-2.5/x"
    monkeypatch.setenv("GPT25_CACHE", "large")
    assert str(node_cache("x")) == f"{tmp_path}/large/x"


# ---- a bucket --------------------------------------------------------------------------------------------------------


def test_urls() -> None:
    assert [is_url(text) for text in ("s3://a/b", "hf://x", "https://x", "HTTP://x")] == [True] * 4
    assert [is_url(text) for text in ("/a/b", "a:b", "C:/x", "./s3://a", "", "data")] == [False] * 6
    assert open_folder("s3://bucket/a//b/").url == "s3://bucket/a/b"
    assert open_folder("gs://bucket/").url == "gs://bucket"
    assert open_folder("s3://bucket/a?b#c d%20e").url == "s3://bucket/a?b#c d%20e"
    for url in ("https://host/x", "hf://datasets/a/b", "abfs://x/y", "S3://bucket/x", "file:///x"):
        assert "is neither a path nor a URL of the form s3://BUCKET/PREFIX" in mistake(partial(open_folder, url))
    for url in ("s3://", "s3:///x", "gs://Bad Bucket!/x", "s3://a\nb/x", "s3://-a/x"):
        with pytest.raises(UserError, match="names no bucket"):
            open_folder(url)


def test_answers_of_503_and_cut_connections_are_healed(s3: S3) -> None:
    folder = open_folder(s3.url)
    content = np.random.default_rng(2).integers(0, 256, 2 * PART, dtype=np.uint8).tobytes()
    s3.fail(Fault(status=503), Fault(), times=1)  # at the first question
    s3.fail(Fault(method="PUT", contains="small", status=503), Fault(method="PUT", contains="small"))
    assert folder.write("small", [b"1"]) == sha256(b"1")
    s3.fail(Fault(method="POST", contains="uploads", status=500), Fault(method="PUT", contains="partNumber=1"))
    s3.fail(Fault(method="PUT", contains="partNumber=2", status=503), Fault(method="PUT", contains="partNumber=2"))
    s3.fail(Fault(method="POST", contains="uploadId", status=503))
    s3.fail(Fault(method="POST", contains="uploadId", forward=True))  # completed, but the answer is lost
    assert folder.write("large", [content]) == sha256(content)
    assert {key: sha256(value) for key, value in s3.objects().items()} == {
        "small": sha256(b"1"),
        "large": sha256(content),
    }
    assert s3.unfinished_uploads() == []
    s3.fail(Fault(method="GET", status=503), Fault(method="GET"), Fault(method="GET", forward=True, cut_after=1000))
    assert folder.read("large") == content
    s3.fail(Fault(method="GET", forward=True, cut_after=10), Fault(method="GET", status=429))
    assert folder.read_range("large", 5, PART) == content[5:PART]
    s3.fail(Fault(status=503), Fault())
    assert folder.names() == ["large", "small"]
    s3.fail(Fault(status=503), Fault())
    assert folder.size("small") == 1
    s3.fail(Fault(status=503))
    folder.delete("small")
    assert s3.keys() == ["large"]
    assert s3.proxy.faults == []


@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_for_good(s3: S3) -> None:
    folder = open_folder(s3.url)
    folder.make()
    for fault, expected in [
        (Fault(status=503), f"{s3.url} answered every request for {s3.url}/a with an error (503); try again later"),
        (Fault(), f"{s3.proxy.url} cannot be reached for {s3.url}/a; check the network"),
    ]:
        s3.fail(fault, times=1000)
        assert expected in mistake(lambda: folder.write("a", [b"1"]))
        assert expected in mistake(lambda: folder.read("a"))
        s3.proxy.forget()
    s3.fail(Fault(method="PUT", contains="partNumber", status=503), times=1000)
    assert "(503)" in mistake(lambda: folder.write("a", [bytes(2 * PART)]))
    assert (s3.keys(), s3.unfinished_uploads()) == ([], [])


def test_a_writer_killed_in_the_middle_leaves_no_object(s3: S3) -> None:
    code = (
        "import os, sys, signal\n"
        "from pipeline.storage.folders import open_folder\n"
        "def parts():\n"
        "    for _ in range(3):\n"
        f"        yield bytes({PART})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_folder(sys.argv[1]).write('a', parts())\n"
    )
    variables = {**os.environ, **environment(s3.proxy.url)}
    killed = subprocess.run([sys.executable, "-c", code, s3.url], cwd=ROOT, env=variables, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any("uploads" in request for request in s3.requests)
    folder = open_folder(s3.url)
    assert folder.names() == []
    folder.remove_leftovers()
    assert folder.write("a", [b"whole"]) == sha256(b"whole")
    assert s3.objects() == {"a": b"whole"}


def test_missing_bucket(s3: S3) -> None:
    url = f"s3://{s3.bucket}-absent"
    folder = open_folder(f"{url}/x")
    expected = f"there is no bucket {url}; create it, or correct its name"
    actions = (folder.make, lambda: folder.read("a"), lambda: folder.write("a", [b"1"]), folder.names)
    assert [mistake(action) for action in actions] == [expected] * 4
    open_folder(s3.url).make()
    s3.client.delete_bucket(Bucket=s3.bucket)  # after the first question
    folder = open_folder(s3.url)
    actions = (folder.make, lambda: folder.read("a"), lambda: folder.write("a", [bytes(PART)]), folder.names)
    assert [mistake(action) for action in actions] == [
        f"there is no bucket {s3.url}; create it, or correct its name"
    ] * 4


def test_refused_credentials(s3: S3, s3_endpoint: FaultyProxy) -> None:
    host, port = s3_endpoint.target

    def check_after(num_requests: str) -> None:
        headers = {"Content-Type": "text/plain"}
        address = f"http://{host}:{port}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, num_requests.encode(), headers, method="POST")).close()

    folder = open_folder(s3.url)
    check_after("0")  # moto knows nobody
    try:
        message = mistake(folder.make)
    finally:
        check_after("inf")
    assert f"{s3.url} refuses the credentials (InvalidAccessKeyId): set AWS_ACCESS_KEY_ID" in message
    folder.make()


def test_denied_access(s3: S3) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    s3.fail(Fault(status=403, body=body))  # the first question: the right to this one key may be missing
    folder = open_folder(s3.url)
    assert folder.write("a", [b"1"]) == sha256(b"1")
    s3.fail(Fault(status=403, body=body))
    expected = f"{s3.url} denies access to {s3.url}/a (AccessDenied); the credentials need the right to it"
    assert mistake(lambda: folder.write("a", [b"2"])) == expected
    s3.fail(Fault(status=301, body=b"<Error><Code>PermanentRedirect</Code></Error>"))
    assert mistake(lambda: folder.read("a")) == f"bucket {s3.url} is in another region; set AWS_REGION to it"
    s3.fail(Fault(status=400, body=b"<Error><Code>Strange</Code><Message>Odd\nthing</Message></Error>"))
    assert "400 Bad Request: Strange Odd thing" in mistake(lambda: folder.read("a"))


@pytest.mark.usefixtures("impatient")
def test_missing_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # a machine without a role
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    expected = f"no credentials for {s3.url} were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert mistake(open_folder(s3.url).make).startswith(expected)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert mistake(open_folder(s3.url).make).startswith(expected)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    s3.client.put_object(Bucket=s3.bucket, Key="public", Body=b"1", ACL="public-read")
    assert open_folder(s3.url).read("public") == b"1"


@pytest.mark.usefixtures("impatient")
def test_missing_google_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody has logged in
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, "127.0.0.1:9")
    for name in ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    folder = open_folder("gs://bucket/x")
    expected = "no credentials for gs://bucket were found: set GOOGLE_APPLICATION_CREDENTIALS to the file"
    assert mistake(folder.make).startswith(expected)
    (tmp_path / "account.json").write_text("{}")
    for path in (tmp_path / "absent.json", tmp_path / "account.json"):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        assert mistake(folder.make).startswith(expected)


@pytest.mark.usefixtures("impatient")
def test_unreachable_store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("NO_PROXY", "*")
        message = mistake(open_folder(s3.url).make)
        assert f"{endpoint} cannot be reached for {s3.url}; check the network, AWS_ENDPOINT_URL" in message


def test_a_bucket_is_asked_once(s3: S3) -> None:
    first, key = bucket_store(f"{s3.url}/some/key")
    second, root = bucket_store(s3.url)
    assert first is second
    assert (key, root) == ("some/key", "")
    assert len(s3.requests) == 1
