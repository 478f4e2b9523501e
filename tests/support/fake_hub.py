"""A hub of one data set on this machine: the routes that huggingface_hub asks for, with real files behind them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.file_server import FileHandler, FileServer, Traffic, digest, serving

NAME = "someone/texts"


class FakeHub(ThreadingHTTPServer):
    """Serves ``files`` (path -> content) as the data set ``someone/texts``; the branch ``main`` is at ``branch``."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits = {"a" * 40: dict(files)}
        self.branch = "a" * 40
        self.branches: dict[str, str] = {}
        """Commits of other branches."""
        self.gated = False
        self.failing = False
        self.traffic = Traffic()
        """Of the files; ``failing`` is for all routes."""
        self.listing_faults: list[tuple[int, dict[str, str]]] = []
        """Status and headers of the next answers to questions other than for files."""
        self.small_paths: set[str] = set()
        """Files that the hub knows by git's hash only."""
        self.store: FileServer | None = None
        """Where given, requests for files are sent on to this server, to an address signed with its query."""
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, commit: str, files: dict[str, bytes]) -> None:
        """Move the branch to a new commit."""
        self.commits[commit] = files
        self.branch = commit

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence: clients are killed in tests."""

    def resolve(self, revision: str) -> str | None:
        """The commit of a revision."""
        if revision in ("main", "refs/convert/parquet"):
            return self.branch
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@contextlib.contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """A hub that answers as long as the block runs."""
    with serving(FakeHub(files)) as hub:
        yield hub


class _Handler(FileHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {unquote(path)}")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.failing:
            return self._send(503, b"")
        if self.server.listing_faults and path.startswith("/api/datasets/"):
            status, headers = self.server.listing_faults.pop(0)
            return self._send(status, b"{}", headers)
        if path == f"/api/datasets/{NAME}/refs":
            refs = {"main": self.server.branch, **self.server.branches}
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit} for n, commit in refs.items()]
            return self._send_json({"branches": branches, "converts": [], "tags": []})
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
        small_paths = self.server.small_paths
        entries = [_describe(path, text, path in small_paths) for path, text in self.server.commits[commit].items()]
        entries = [entry for entry in entries if f"/{entry['path']}".startswith(f"{folder}/")]
        if route == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            return self._send_json({"id": NAME, "sha": commit, "private": False, "siblings": siblings})
        if route == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            folders = {str(parent) for path in self.server.commits[commit] for parent in PurePosixPath(path).parents}
            entries = [entry for entry in entries if entry["path"] in wanted]
            entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders & set(wanted))]
        elif folder and not entries:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._send_json(entries)

    def _answer_file(self, revision: str, path: str) -> None:
        commit = self.server.resolve(revision)
        content = self.server.commits[commit or ""].get(path) if commit else None
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{digest("sha256", content)}"',
            "X-Repo-Commit": str(commit),
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if self.server.store is not None:
            location = f"{self.server.store.url}/{path}?{self.server.store.required_query}"
            return self._send(302, b"", {**headers, "Location": location})
        self.send_file(path, content, headers)

    def _send_json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_body(status, content, headers or {})


def _describe(path: str, content: bytes, is_small: bool) -> dict[str, Any]:
    blob = digest("sha1", b"blob %d\0" % len(content) + content)
    entry = {"type": "file", "path": path, "oid": blob, "size": len(content)}
    if is_small:
        return entry
    return {**entry, "lfs": {"oid": digest("sha256", content), "size": len(content), "pointerSize": 130}}
