"""S3 on this machine: moto's server over HTTP, and in front of it a proxy that fails when it is told to.

Fixtures (made known in ``conftest.py``): ``s3_endpoint`` (session) is the proxy, which has the same address in all
tests, so that ``environment(url)`` can be handed to Ray workers when Ray starts; ``s3`` (test) sets that environment
for this process, makes a bucket of its own and forgets all faults before and after.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the next request in place of a plain answer."""

    method: str = ""
    """Only to requests of this method (GET, PUT, POST, DELETE, HEAD); all where empty."""
    contains: str = ""
    """Only to requests whose path and query contain this."""
    status: int | None = None
    """Answered in place of the server; None cuts the connection."""
    headers: tuple[tuple[str, str], ...] = ()
    """Of that answer, as ("Retry-After", "1")."""
    body: bytes = b""
    """Of that answer."""
    forward: bool = False
    """For a cut: whether the server gets the request all the same, so that only the answer is lost."""
    cut_after: int = 0
    """For a cut of a forwarded request: bytes of the answer's body that still get through."""


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to ``target`` (host, port); each of ``faults`` is used up by the first request that it concerns."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """Method, path and query of all requests."""
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, *faults: Fault, times: int = 1) -> None:
        """Do this to the next requests, ``times`` over."""
        with self._lock:
            self.faults.extend(faults * times)

    def forget(self) -> None:
        """No faults, no requests seen."""
        with self._lock:
            self.faults.clear()
            self.requests.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """Note a request; the fault that it meets."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for index, fault in enumerate(self.faults):
                if fault.method in ("", method) and fault.contains in path:
                    return self.faults.pop(index)
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence: clients are killed in tests."""


@contextlib.contextmanager
def running_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at the URL ``target`` as long as the block runs."""
    parts = urlsplit(target)
    proxy = FaultyProxy((parts.hostname or "", parts.port or 80))
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_PUT(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def do_DELETE(self) -> None:
        self._pass_on()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.take(self.command, self.path)
        if fault is not None and fault.status is not None:
            return self._send(fault.status, list(fault.headers), fault.body)
        if fault is not None and not fault.forward:
            return self._cut()
        connection = http.client.HTTPConnection(*self.server.target, timeout=60)
        try:
            connection.putrequest(self.command, _plain(self.path), skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        cut_after = None if fault is None else fault.cut_after
        return self._send(answer.status, answer.getheaders(), content, cut_after=cut_after)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut_after: int | None = None) -> None:
        if cut_after == 0:
            return self._cut()
        self.send_response(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = lengths[0] if self.command == "HEAD" and lengths else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _plain(path: str) -> str:
    """The same path with nothing escaped that need not be (RFC 3986, 6.2.2.2): moto takes a bucket's name as it is."""
    return path.replace("%2D", "-").replace("%2E", ".").replace("%5F", "_").replace("%7E", "~")


def environment(url: str) -> dict[str, str]:
    """The environment variables with which S3 is reached at ``url``."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@dataclass(frozen=True, kw_only=True)
class S3:
    """A bucket of this test alone, and the proxy that the code under test goes through."""

    bucket: str
    proxy: FaultyProxy
    client: Any
    """boto3's, past the proxy: what the tests prepare and check with."""

    @property
    def url(self) -> str:
        """s3://BUCKET."""
        return f"s3://{self.bucket}"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self) -> list[str]:
        """All keys, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def objects(self) -> dict[str, bytes]:
        """Key -> content of everything in the bucket."""
        return {key: self.get(key) for key in self.keys()}

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted."""
        answer = self.client.list_multipart_uploads(Bucket=self.bucket)
        return [entry["Key"] for entry in answer.get("Uploads", [])]

    def fail(self, *faults: Fault, times: int = 1) -> None:
        """Faults for the next requests of the code under test."""
        self.proxy.fail(*faults, times=times)

    @property
    def requests(self) -> list[str]:
        """Method, path and query of the requests of the code under test."""
        return self.proxy.requests


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[FaultyProxy]:
    """A proxy in front of moto's server; its ``url`` is the endpoint for all tests of the session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with running_proxy(f"http://{host}:{port}") as proxy:
            yield proxy
    finally:
        server.stop()


@pytest.fixture
def s3(s3_endpoint: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A new, empty bucket; this process's environment leads to it, through the proxy."""
    import boto3

    for name, value in environment(s3_endpoint.url).items():
        monkeypatch.setenv(name, value)
    host, port = s3_endpoint.target
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    s3_endpoint.forget()
    yield S3(bucket=bucket, proxy=s3_endpoint, client=client)
    s3_endpoint.forget()
    client.close()
