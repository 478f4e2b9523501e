"""Files over HTTP with ranges and ETags, and what goes wrong on the way; the fake hub sends its files so too."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ALWAYS = 10**9


@dataclass(kw_only=True)
class Fault:
    """What befalls the next requests for a file."""

    times: int = 1
    after: int = 0
    """Requests that are answered well before."""
    path: str = ""
    """Only requests whose path ends with this."""
    first_byte: int = 0
    """Only requests for a range that starts here or later."""
    status: int | None = None
    """Answered in place of the file."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of that answer; else added to the good ones."""
    cut_after: int | None = None
    """Bytes of the body, then the connection breaks."""
    content: bytes | None = None
    """Another content under the same ETag, that is, of the wrong checksum."""
    total_bytes: int | None = None
    """A wrong length of the file in Content-Range."""
    delay_seconds: float = 0.0
    """Silence before the answer."""


@functools.lru_cache(maxsize=64)
def digest(algorithm: str, content: bytes) -> str:
    """Counted once for each content."""
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()


class Traffic:
    """Faults to come and requests that were."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, int, int]] = []
        """Path, start and stop of every request for a file; a request without a range asks for all."""
        self.sent_bytes = 0
        self.together: threading.Barrier | None = None
        """Requests for more than a byte are answered only when so many of them wait."""
        self.latency_seconds = 0.0
        self.bytes_per_second = 0.0
        """Of one connection; 0 for as fast as it goes."""

    def fail(self, **values: Any) -> None:
        """Add a fault."""
        with self.lock:
            self.faults.append(Fault(**values))

    def forget(self) -> None:
        with self.lock:
            self.faults.clear()
            self.asked.clear()
            self.sent_bytes = 0

    def asked_bytes(self, path: str = "") -> int:
        return sum(stop - start for name, start, stop in self.asked if name.endswith(path))

    def take(self, path: str, start: int) -> Fault:
        """The fault that this request meets; one without effect if there is none."""
        with self.lock:
            for fault in self.faults:
                if not path.endswith(fault.path) or start < fault.first_byte or not fault.times:
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return Fault()


class FileHandler(BaseHTTPRequestHandler):
    """Sends parts of contents; ``server.traffic`` says how well."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def send_file(self, path: str, content: bytes, headers: dict[str, str], *, ranges: bool = True) -> None:
        """Answer with the range that was asked for, or with what the next fault makes of it."""
        traffic: Traffic = self.server.traffic
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
        start, stop = (int(part[1]), int(part[2]) + 1) if part else (0, len(content))
        fault = traffic.take(path, start)
        with traffic.lock:
            traffic.asked.append((path, start, stop))
        if traffic.together is not None and stop - start > 1:
            traffic.together.wait(1200)
        time.sleep(traffic.latency_seconds + fault.delay_seconds)
        if fault.status is not None:
            return self.send_body(fault.status, b"refused", fault.headers)
        content = content if fault.content is None else fault.content
        total = len(content) if fault.total_bytes is None else fault.total_bytes
        if part is None:
            return self.send_body(200, content, {**headers, **fault.headers}, cut_after=fault.cut_after)
        if start >= len(content):
            return self.send_body(416, b"", {"Content-Range": f"bytes */{total}"})
        body = content[start:stop]
        headers = {**headers, "Content-Range": f"bytes {start}-{start + len(body) - 1}/{total}", **fault.headers}
        return self.send_body(206, body, headers, cut_after=fault.cut_after)

    def send_body(self, status: int, body: bytes, headers: dict[str, str], *, cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        else:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        with contextlib.suppress(OSError):  # clients are killed, or have what they want
            self.end_headers()
            if self.command != "HEAD":
                self._write(body[:cut_after])
            if cut_after is not None and cut_after < len(body):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def _write(self, body: bytes) -> None:
        traffic: Traffic = self.server.traffic
        for first in range(0, len(body), 1 << 18):
            chunk = body[first : first + (1 << 18)]
            if traffic.bytes_per_second:
                time.sleep(len(chunk) / traffic.bytes_per_second)
            with traffic.lock:  # before the client has it, and the test goes on
                traffic.sent_bytes += len(chunk)
            self.wfile.write(chunk)


class FileServer(ThreadingHTTPServer):
    """Serves ``files`` (path -> content) under their paths."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.traffic = Traffic()
        self.ranges = True
        self.etags = True
        self.lengths = True
        self.content_type = ""
        self.required_query = ""
        """Requests with another query are refused, as those of signed addresses whose time is over."""
        self.headers_seen: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence."""


class _Handler(FileHandler):
    server: FileServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path).removeprefix("/")
        self.server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.required_query and parts.query != self.server.required_query:
            return self.send_body(403, b"expired", {})
        content = self.server.files.get(path)
        if content is None:
            return self.send_body(404, b"no such file", {})
        headers = {"ETag": f'"{digest("md5", content)}"'} if self.server.etags else {}
        if self.server.content_type:
            headers["Content-Type"] = self.server.content_type
        if not self.server.lengths:
            return self.send_body(200, content, {**headers, "Transfer-Encoding": "chunked"})
        return self.send_file(path, content, headers, ranges=self.server.ranges)


@contextlib.contextmanager
def running_files(files: dict[str, bytes]) -> Iterator[FileServer]:
    """A server that answers as long as the block runs."""
    with serving(FileServer(files)) as server:
        yield server


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    """``server`` in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
