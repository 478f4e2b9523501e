"""A hub of one data set on this machine: the routes that huggingface_hub asks for, with real files behind them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "someone/texts"


class FakeHub(ThreadingHTTPServer):
    """Serves ``files`` (path -> content) as the data set ``someone/texts``; the branch ``main`` is at ``commit``."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits = {"a" * 40: dict(files)}
        self.branch = "a" * 40
        self.gated = False
        self.failing = False
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, commit: str, files: dict[str, bytes]) -> None:
        """Move the branch to a new commit."""
        self.commits[commit] = files
        self.branch = commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a revision."""
        if revision in ("main", "refs/convert/parquet"):
            return self.branch
        return revision if revision in self.commits else None


@contextlib.contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """A hub that answers as long as the block runs."""
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _answer(self, body: bytes = b"") -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {unquote(path)}")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.failing:
            return self._send(503, b"")
        if api := re.fullmatch(rf"/api/datasets/{NAME}(?:/(revision|tree|paths-info)/([^/]+)(/.+)?)?", path):
            return self._answer_api(api[1] or "revision", unquote(api[2] or "main"), unquote(api[3] or ""), body)
        if file := re.fullmatch(rf"/datasets/{NAME}/resolve/([^/]+)/(.+)", path):
            return self._answer_file(unquote(file[1]), unquote(file[2]))
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer_api(self, route: str, revision: str, folder: str, body: bytes) -> None:
        if self.server.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        commit = self.server.resolve(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        entries = [_describe(path, content) for path, content in self.server.commits[commit].items()]
        entries = [entry for entry in entries if f"/{entry['path']}".startswith(f"{folder}/")]
        if route == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            return self._send_json({"id": NAME, "sha": commit, "private": False, "siblings": siblings})
        if route == "paths-info":
            wanted = json.loads(body)["paths"]
            entries = [entry for entry in entries if entry["path"] in wanted]
        return self._send_json(entries)

    def _answer_file(self, revision: str, path: str) -> None:
        commit = self.server.resolve(revision)
        content = self.server.commits[commit or ""].get(path) if commit else None
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": str(commit),
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(part[1]), min(int(part[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._send(206, content[start:stop], headers)
        return self._send(200, content, headers)

    def _send_json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _describe(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {
        "type": "file",
        "path": path,
        "oid": digest[:40],
        "size": len(content),
        "lfs": {"oid": digest, "size": len(content), "pointerSize": 130},
    }
