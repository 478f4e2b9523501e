"""A hub of models on this machine: the routes that huggingface_hub asks for to push a folder and to fetch it again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writesEverything"


class FakeModelHub(ThreadingHTTPServer):
    """Keeps models (name -> commit -> path -> content); a write needs TOKEN."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add files to the model's newest commit."""
        before = self.models.get(name, {}).get(self.branches.get(name, ""), {})
        content = before | files
        commit = hashlib.sha1(repr(sorted((path, hash(data)) for path, data in content.items())).encode()).hexdigest()
        self.models.setdefault(name, {})[commit] = content
        self.branches[name] = commit
        return commit


@contextlib.contextmanager
def running_model_hub() -> Iterator[FakeModelHub]:
    """A hub that answers as long as the block runs."""
    hub = FakeModelHub()
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
    server: FakeModelHub

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self._send(200, b"")

    def do_POST(self) -> None:  # noqa: PLR0911  # a route each
        body = self._body()
        path = urlsplit(self.path).path
        self.server.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path != "/verify" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._json({"files": [_upload_mode(file) for file in json.loads(body)["files"]]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json(
                {"transfer": "basic", "objects": [self._instruct(o) for o in json.loads(body)["objects"]]}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._send(200 if path == "/verify" else 404, b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _create(self, values: dict[str, Any]) -> None:
        name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
        if name not in self.server.models:
            self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _instruct(self, entry: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.server.url}/blobs/{entry['oid']}"}}
        return {**entry, "authenticated": True, "actions": actions}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.server.commit(name, files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _read(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path):
            return self._describe(match[1], unquote(match[2]), is_tree="/tree/" in path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], unquote(match[2]), unquote(match[3]))
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, name: str, revision: str) -> str | None:
        commit = self.server.branches.get(name) if revision == "main" else revision
        return commit if commit in self.server.models.get(name, {}) else None

    def _describe(self, name: str, revision: str, *, is_tree: bool) -> None:
        commit = self._resolve(name, revision)
        if commit is None:
            code = "RevisionNotFound" if name in self.server.models else "RepoNotFound"
            return self._send(404, b"{}", {"X-Error-Code": code})
        files = self.server.models[name][commit]
        entries = [
            {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for path, content in files.items()
        ]
        if is_tree:
            return self._json(entries)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str) -> None:
        commit = self._resolve(name, revision)
        content = self.server.models[name][commit].get(path) if commit else None
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": str(commit), "X-Linked-Size": str(len(content))}
        return self._send(200, content, headers)

    def _json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
